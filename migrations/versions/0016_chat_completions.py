"""Stored chat completions: responses that were made as such, and lists of them along the same facets.

The new column has no default, so nothing is rewritten; processes of the version before leave it null. Metadata may change now, and
facets follow.
"""

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None

KEEP = """
create or replace function keep_facets() returns trigger language plpgsql as $$
declare
    is_listed boolean := tg_op <> 'DELETE' and new.deleted_at is null
                         and (new.background or new.status not in ('queued', 'in_progress'));
    was_listed boolean := tg_op <> 'INSERT' and old.deleted_at is null
                          and (old.background or old.status not in ('queued', 'in_progress'));
begin
    if was_listed and is_listed and old.status = new.status {unchanged} then
        return null;
    end if;
    if was_listed then
        delete from facets
        where tenant_id = old.tenant_id and facet in (select * from facets_of(old.status, old.model, old.metadata))
          and created_at = old.created_at and response_id = old.id;
        {forget_chat}
    end if;
    if is_listed then
        insert into facets (tenant_id, facet, created_at, response_id)
        select new.tenant_id, facet, new.created_at, new.id
        from facets_of(new.status, new.model, new.metadata) facets_of (facet) on conflict do nothing;
        {keep_chat}
    end if;
    return null;
end $$
"""

# In statements of their own: a union would double what every other response costs to list.
FORGET_CHAT = """
        if old.is_chat and old.status in ('completed', 'incomplete') then
            delete from facets
            where tenant_id = old.tenant_id
              and facet in (select * from facets_of('chat_completion', old.model, old.metadata))
              and created_at = old.created_at and response_id = old.id;
        end if;
"""
KEEP_CHAT = """
        if new.is_chat and new.status in ('completed', 'incomplete') then
            insert into facets (tenant_id, facet, created_at, response_id)
            select new.tenant_id, facet, new.created_at, new.id
            from facets_of('chat_completion', new.model, new.metadata) facets_of (facet) on conflict do nothing;
        end if;
"""

TRIGGER = """
create or replace trigger keep_facets after insert or delete or update of {columns} on responses
for each row execute function keep_facets()
"""


def upgrade() -> None:
    op.add_column(
        "responses", sa.Column("is_chat", sa.Boolean(), comment="true: it was made as a chat completion; else null")
    )
    op.execute(KEEP.format(unchanged="and old.metadata = new.metadata", forget_chat=FORGET_CHAT, keep_chat=KEEP_CHAT))
    op.execute(TRIGGER.format(columns="status, deleted_at, metadata"))


def downgrade() -> None:
    op.execute(TRIGGER.format(columns="status, deleted_at"))
    op.execute(KEEP.format(unchanged="", forget_chat="", keep_chat=""))
    op.execute("""
        delete from facets using responses, lateral facets_of('chat_completion', model, metadata) chat (facet)
        where is_chat and facets.tenant_id = responses.tenant_id and facets.response_id = responses.id
          and facets.facet = chat.facet
    """)
    op.drop_column("responses", "is_chat")
