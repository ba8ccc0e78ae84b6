"""Conversations: pointers to turns, and the items that are removed from them. Lists of them walk along the same facets.

The new columns have no default, so nothing is rewritten, and processes of the version before never read them.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

KEEP = """
create function keep_conversation_facets() returns trigger language plpgsql as $$
begin
    if tg_op <> 'INSERT' then
        delete from facets
        where tenant_id = old.tenant_id and facet in (select * from facets_of('conversation', null, old.metadata))
          and created_at = old.created_at and response_id = old.id;
    end if;
    if tg_op <> 'DELETE' then
        insert into facets (tenant_id, facet, created_at, response_id)
        select new.tenant_id, facet, new.created_at, new.id
        from facets_of('conversation', null, new.metadata) facet where facet is not null
        on conflict do nothing;
    end if;
    return null;
end $$
"""

TRIGGER = """
create trigger keep_facets after insert or delete or update of metadata on conversations
for each row execute function keep_conversation_facets()
"""


def upgrade() -> None:
    op.add_column(
        "branches",
        sa.Column(
            "parent_position", sa.Integer(), comment="the last item of that turn that it has; null: the whole turn"
        ),
    )
    op.add_column(
        "responses",
        sa.Column(
            "conversation_id", sa.Text(), comment="whose thread it is made in; nothing else continues that thread"
        ),
    )
    op.alter_column("facets", "response_id", comment="or the id of a conversation")
    op.create_table(
        "conversations",
        sa.Column("tenant_id", sa.Text(), primary_key=True),
        sa.Column("id", sa.Text(), primary_key=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False, comment="unix seconds"),
        sa.Column("metadata", JSONB(), nullable=False),
        sa.Column("thread_id", sa.Text(), nullable=False),
        sa.Column("turn", sa.Integer(), nullable=False, comment="the last one that belongs to it; 0: it has no items"),
        sa.Column("context_bytes", sa.BigInteger(), comment="of its items; null where that was not counted yet"),
        sa.Column(
            "writer", sa.Text(), comment="the response that took it last; it is locked while that one is in flight"
        ),
    )
    op.create_index("conversations_tenant_id_thread_id_idx", "conversations", ["tenant_id", "thread_id"])
    op.create_table(
        "removals",
        sa.Column("tenant_id", sa.Text(), primary_key=True),
        sa.Column("thread_id", sa.Text(), primary_key=True),
        sa.Column("turn", sa.Integer(), primary_key=True, comment="contexts up to an earlier turn keep the item"),
        sa.Column("item_thread_id", sa.Text(), primary_key=True),
        sa.Column("item_turn", sa.Integer(), primary_key=True),
        sa.Column("item_position", sa.Integer(), primary_key=True),
    )
    op.execute(KEEP)
    op.execute(TRIGGER)


def downgrade() -> None:
    op.drop_table("removals")
    op.drop_table("conversations")
    op.execute("drop function keep_conversation_facets")
    op.execute("delete from facets where response_id like 'conv\\_%'")
    op.alter_column("facets", "response_id", comment=None)
    op.drop_column("branches", "parent_position")
    op.drop_column("responses", "conversation_id")
