"""Background runs: the queue and its leases, the journal and the archive of events."""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSON

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.drop_index("runs_worker_idx", "runs")
    op.drop_index("runs_lease_until_idx", "runs")
    op.alter_column("runs", "worker", nullable=True)
    op.alter_column(
        "runs", "lease_until", new_column_name="due_at", comment="queued: not before; else: when the lease runs out"
    )
    state = "queued, running, cancelled: its end is decided, not yet made; sealed: its last event is not yet out"
    new: tuple[sa.Column[Any], ...] = (
        sa.Column("state", sa.Text(), nullable=False, server_default="running", comment=state),
        sa.Column(
            "lease",
            sa.Integer(),
            nullable=False,
            server_default="1",
            comment="one more with each owner; 0: never owned",
        ),
        sa.Column("request", JSON(), comment="what to make; absent for foreground runs, which nobody can take over"),
        sa.Column("caller_key", sa.Text(), comment="sealed; kept only while the run lives"),
        sa.Column("streamed", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column(
            "number_ceiling",
            sa.BigInteger(),
            nullable=False,
            server_default="0",
            comment="no owner has sent an event with a number this high",
        ),
        sa.Column("redis_run", sa.Text(), comment="which life of its stream in Redis holds all that was sent"),
    )
    for column in new:
        op.add_column("runs", column)
        if column.server_default is not None:
            op.alter_column("runs", column.name, server_default=None)
    op.create_index("runs_queued_idx", "runs", ["tenant_id", "due_at"], postgresql_where=sa.text("state = 'queued'"))
    op.create_index("runs_due_idx", "runs", ["due_at"], postgresql_where=sa.text("state <> 'queued'"))
    op.create_table(
        "event_journal",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("response_id", sa.Text(), nullable=False),
        sa.Column("first_number", sa.BigInteger(), nullable=False),
        sa.Column(
            "frames",
            sa.LargeBinary(),
            nullable=False,
            comment="events up to the end of an item, before their readers hear of it",
        ),
        sa.PrimaryKeyConstraint("tenant_id", "response_id", "first_number", name="event_journal_pkey"),
    )
    op.create_table(
        "event_archive",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("response_id", sa.Text(), nullable=False),
        sa.Column("frames", sa.LargeBinary(), nullable=False, comment="every event of an ended response, zstd"),
        sa.PrimaryKeyConstraint("tenant_id", "response_id", name="event_archive_pkey"),
    )


def downgrade() -> None:
    op.drop_table("event_archive")
    op.drop_table("event_journal")
    op.execute("delete from runs where worker is null")
    op.drop_index("runs_due_idx", "runs")
    op.drop_index("runs_queued_idx", "runs")
    for column in ("redis_run", "number_ceiling", "streamed", "caller_key", "request", "lease", "state"):
        op.drop_column("runs", column)
    op.alter_column("runs", "due_at", new_column_name="lease_until", comment=None)
    op.alter_column("runs", "worker", nullable=False)
    op.create_index("runs_lease_until_idx", "runs", ["lease_until"])
    op.create_index("runs_worker_idx", "runs", ["worker"])
