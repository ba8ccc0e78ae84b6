"""Parts of bodies that are kept once per tenant, and which rows use them. Kept by triggers.

The new columns have no default, so nothing is rewritten, and rows of before stay whole. Processes of the version before can't read
what this one writes: stop them first.
"""

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None

HASHES_OF = """
create function hashes_of(part_hashes bytea) returns setof bytea language sql immutable as $$
    select distinct substr(part_hashes, 32 * at + 1, 32) from generate_series(0, octet_length(part_hashes) / 32 - 1) at
$$
"""

# Each statement sees what has been committed before it. Of two that free the last uses of a part, the later one waits at the first
# lock, and then sees that it is unused; one that begins to use it is waited for at the second lock, or waits for us and stores it again.
FREE = """
create function free_parts(tenant text, hashes bytea[]) returns void language plpgsql as $$
begin
    perform from parts where tenant_id = tenant and hash = any(hashes) order by hash for no key update;
    perform from parts
    where tenant_id = tenant and hash = any(hashes)
      and not exists (select from part_uses one where one.tenant_id = tenant and one.hash = parts.hash)
    order by hash for update;
    delete from parts
    where tenant_id = tenant and hash = any(hashes)
      and not exists (select from part_uses one where one.tenant_id = tenant and one.hash = parts.hash);
end $$
"""

KEEP = """
create function keep_part_uses() returns trigger language plpgsql as $$
declare
    at int := -1;
    unused bytea[];
begin
    if tg_table_name = 'items' then
        at := new.position;
    end if;
    if tg_op = 'UPDATE' then
        unused := array(select hashes_of(old.part_hashes) except select hashes_of(new.part_hashes));
        delete from part_uses
        where tenant_id = old.tenant_id and hash = any(unused)
          and thread_id = old.thread_id and turn = old.turn and position = at;
        perform free_parts(old.tenant_id, unused);
    end if;
    insert into part_uses (tenant_id, hash, thread_id, turn, position)
    select new.tenant_id, hash, new.thread_id, new.turn, at from hashes_of(new.part_hashes) hash
    on conflict do nothing;
    return null;
end $$
"""

FORGET = """
create function forget_part_uses() returns trigger language plpgsql as $$
begin
    if tg_table_name = 'items' then
        delete from part_uses used using gone cross join lateral hashes_of(gone.part_hashes) part (hash)
        where gone.part_hashes is not null and used.tenant_id = gone.tenant_id and used.hash = part.hash
          and used.thread_id = gone.thread_id and used.turn = gone.turn and used.position = gone.position;
    else
        delete from part_uses used using gone cross join lateral hashes_of(gone.part_hashes) part (hash)
        where gone.part_hashes is not null and used.tenant_id = gone.tenant_id and used.hash = part.hash
          and used.thread_id = gone.thread_id and used.turn = gone.turn and used.position = -1;
    end if;
    return null;
end $$
"""

TRIGGERS = """
create trigger keep_part_uses after insert on {table} for each row when (new.part_hashes is not null)
execute function keep_part_uses();
create trigger forget_part_uses after delete on {table} referencing old table as gone
for each statement execute function forget_part_uses()
"""

AGAIN = """
create trigger keep_part_uses_again after update of part_hashes on responses
for each row when (old.part_hashes is distinct from new.part_hashes) execute function keep_part_uses()
"""

WHOLE = """
update {table} one set part_hashes = null, bytes = null, body = cast((
    select string_agg(around.text || coalesce(part.body, ''), '' order by around.number)
    from json_array_elements_text(one.body) with ordinality around (text, number)
    left join parts part on part.tenant_id = one.tenant_id
                        and part.hash = substr(one.part_hashes, cast(32 * (around.number - 1) + 1 as int), 32)
) as json) where part_hashes is not null
"""

TABLES = ("responses", "items")


def upgrade() -> None:
    op.create_table(
        "parts",
        sa.Column("tenant_id", sa.Text(), primary_key=True),
        sa.Column("hash", sa.LargeBinary(), primary_key=True, comment="SHA-256 of the body"),
        sa.Column(
            "body",
            sa.Text(),
            nullable=False,
            comment="what rows share: tool lists, instructions, long strings, as JSON",
        ),
    )
    op.create_table(
        "part_uses",
        sa.Column("tenant_id", sa.Text(), primary_key=True),
        sa.Column("hash", sa.LargeBinary(), primary_key=True),
        sa.Column("thread_id", sa.Text(), primary_key=True),
        sa.Column("turn", sa.Integer(), primary_key=True),
        sa.Column("position", sa.Integer(), primary_key=True, comment="of the item; -1: the response"),
        sa.ForeignKeyConstraint(
            ["tenant_id", "hash"], ["parts.tenant_id", "parts.hash"], name="part_uses_tenant_id_fkey"
        ),
    )
    for function in (HASHES_OF, FREE, KEEP, FORGET):
        op.execute(function)
    for table in TABLES:
        op.add_column(
            table,
            sa.Column(
                "part_hashes",
                sa.LargeBinary(),
                comment="SHA-256 of each, one after another; then `body` lists the texts around them",
            ),
        )
        op.add_column(table, sa.Column("bytes", sa.Integer(), comment="of the body with its parts; null without them"))
        for trigger in TRIGGERS.format(table=table).split(";"):
            op.execute(trigger)
    op.execute(AGAIN)


# What was compressed with the parts of its response can't be read by the version before, which has no streams of these then.
DROP_ARCHIVES = """
delete from event_archive page using responses response
where response.part_hashes is not null and page.tenant_id = response.tenant_id and page.response_id = response.id
"""


def downgrade() -> None:
    op.execute(DROP_ARCHIVES)
    op.execute("drop trigger keep_part_uses_again on responses")
    for table in TABLES:
        op.execute(f"drop trigger keep_part_uses on {table}")
        op.execute(f"drop trigger forget_part_uses on {table}")
        op.execute(WHOLE.format(table=table))
        op.drop_column(table, "part_hashes")
        op.drop_column(table, "bytes")
    for function in ("forget_part_uses()", "keep_part_uses()", "free_parts(text, bytea[])", "hashes_of(bytea)"):
        op.execute(f"drop function {function}")
    op.drop_table("part_uses")
    op.drop_table("parts")
