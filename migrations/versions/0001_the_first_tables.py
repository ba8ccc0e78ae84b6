"""The first tables: tenants and keys, responses and their items, the branches of threads, runs with their leases."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSON, JSONB

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

TENANTS = ("tenants", "keys")
THREADS = ("responses", "items", "branches", "runs")


def upgrade() -> None:
    op.create_table(
        "tenants",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="tenants_pkey"),
    )
    op.create_table(
        "keys",
        sa.Column(
            "hash", sa.LargeBinary(), nullable=False, comment="SHA-256 of the key; the key itself is kept nowhere"
        ),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.Column("revoked_at", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("hash", name="keys_pkey"),
        sa.UniqueConstraint("id", name="keys_id_key"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="keys_tenant_id_fkey"),
    )
    op.create_table(
        "responses",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("thread_id", sa.Text(), nullable=False),
        sa.Column("turn", sa.Integer(), nullable=False),
        sa.Column("previous_response_id", sa.Text()),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("background", sa.Boolean(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("metadata", JSONB(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False, comment="unix seconds"),
        sa.Column("deleted_at", sa.DateTime(timezone=True), comment="set while later responses still need the items"),
        sa.Column("body", JSON(), nullable=False, comment="the response object without its output"),
        sa.PrimaryKeyConstraint("tenant_id", "id", name="responses_pkey"),
        postgresql_with={"fillfactor": "85"},
    )
    op.create_index(
        "responses_tenant_id_thread_id_turn_key", "responses", ["tenant_id", "thread_id", "turn"], unique=True
    )
    op.create_table(
        "items",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("thread_id", sa.Text(), nullable=False),
        sa.Column("turn", sa.Integer(), nullable=False),
        sa.Column(
            "position", sa.Integer(), nullable=False, comment="input items from 0, output items from OUTPUT_POSITION"
        ),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("body", JSON(), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "thread_id", "turn", "position", name="items_pkey"),
    )
    op.create_index("items_tenant_id_id_idx", "items", ["tenant_id", "id"])
    op.create_table(
        "branches",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("thread_id", sa.Text(), nullable=False),
        sa.Column("parent_thread_id", sa.Text(), nullable=False),
        sa.Column("parent_turn", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "thread_id", name="branches_pkey"),
    )
    op.create_index("branches_tenant_id_parent_idx", "branches", ["tenant_id", "parent_thread_id", "parent_turn"])
    op.create_table(
        "runs",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("response_id", sa.Text(), nullable=False),
        sa.Column("worker", sa.Text(), nullable=False),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "response_id", name="runs_pkey"),
    )
    op.create_index("runs_lease_until_idx", "runs", ["lease_until"])
    op.create_index("runs_worker_idx", "runs", ["worker"])
    _compress_bodies()


def _compress_bodies() -> None:
    """lz4 reads a long context faster than the default; not every Postgres is built with it."""
    connection = op.get_bind()
    known = connection.scalar(sa.text("select enumvals from pg_settings where name = 'default_toast_compression'"))
    if known and "lz4" in known:
        op.execute("alter table items alter column body set compression lz4")
        op.execute("alter table responses alter column body set compression lz4")


def downgrade() -> None:
    for table in reversed((*TENANTS, *THREADS)):
        op.drop_table(table)
