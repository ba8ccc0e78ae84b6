"""Facets: what lists walk along. Kept by triggers, so that processes of the version before keep them, too.

On a live database: to make the trigger, this waits for the writes to `responses` that are under way, and new ones wait
meanwhile. The rows that are there already follow in batches, which commit one by one and each hold up the ends and deletions
of their own responses only; reads are never held up. A million responses with two entries of metadata each take two minutes
of one core and 1.9 GB, those without metadata a third. Until it is through processes of this version do not start. If it
breaks off it may be started again.
"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

BATCH = 2_000

# Terms in the order of their bytes, as in app/storage/facets.py. In SQL, and not volatile, it becomes part of what calls it.
FACETS_OF = """
create or replace function facets_of(status text, model text, metadata jsonb) returns setof bigint
language sql immutable as $$
    with terms as materialized (
        select chr(1) || model as term union all select key || chr(2) || value from jsonb_each_text(metadata)
    )
    select ('x' || left(encode(sha256(convert_to(name, 'UTF8')), 'hex'), 16))::bit(64)::bigint
    from (
        select status as name
        union all select status || chr(3) || term from terms
        union all select status || chr(3) || one.term || chr(3) || other.term
                  from terms one, terms other where one.term < other.term collate "C"
    ) names
$$
"""

KEEP = """
create or replace function keep_facets() returns trigger language plpgsql as $$
declare
    is_listed boolean := tg_op <> 'DELETE' and new.deleted_at is null
                         and (new.background or new.status not in ('queued', 'in_progress'));
    was_listed boolean := tg_op <> 'INSERT' and old.deleted_at is null
                          and (old.background or old.status not in ('queued', 'in_progress'));
begin
    if was_listed and is_listed and old.status = new.status then
        return null;
    end if;
    if was_listed then
        delete from facets
        where tenant_id = old.tenant_id and facet in (select * from facets_of(old.status, old.model, old.metadata))
          and created_at = old.created_at and response_id = old.id;
    end if;
    if is_listed then
        insert into facets (tenant_id, facet, created_at, response_id)
        select new.tenant_id, facet, new.created_at, new.id
        from facets_of(new.status, new.model, new.metadata) facet
        on conflict do nothing;
    end if;
    return null;
end $$
"""

TRIGGERS = """
create or replace trigger keep_facets after insert or delete or update of status, deleted_at on responses
for each row execute function keep_facets()
"""

# Rows that are being written meanwhile are waited for; their facets are kept by then, and stay as they are.
FILL = sa.text("""
with batch as (
    select tenant_id, id, status, model, metadata, created_at, deleted_at, background from responses
    where (tenant_id, id) > (:tenant_id, :id)
    order by tenant_id, id limit :batch for share
), filled as (
    insert into facets (tenant_id, facet, created_at, response_id)
    select tenant_id, facet, created_at, id from batch cross join lateral facets_of(status, model, metadata) facet
    where deleted_at is null and (background or status not in ('queued', 'in_progress'))
    on conflict do nothing
)
select tenant_id, id from batch order by tenant_id desc, id desc limit 1
""")


def upgrade() -> None:
    with op.get_context().autocommit_block():
        op.create_table(
            "facets",
            sa.Column("tenant_id", sa.Text(), primary_key=True),
            sa.Column("facet", sa.BigInteger(), primary_key=True, autoincrement=False),
            sa.Column("created_at", sa.BigInteger(), primary_key=True, autoincrement=False),
            sa.Column("response_id", sa.Text(), primary_key=True),
            if_not_exists=True,
        )
        op.execute(FACETS_OF)
        op.execute(KEEP)
        op.execute(TRIGGERS)
        op.execute("set jit = off")  # each batch would be compiled anew
        place = {"tenant_id": "", "id": ""}
        while last := op.get_bind().execute(FILL, {**place, "batch": BATCH}).one_or_none():
            place = {"tenant_id": last.tenant_id, "id": last.id}
        op.execute("analyze facets")


def downgrade() -> None:
    op.execute("drop trigger keep_facets on responses")
    op.execute("drop function keep_facets")
    op.execute("drop function facets_of")
    op.drop_table("facets")
