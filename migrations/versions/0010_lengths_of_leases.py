"""How long a run's lease lasts without a heartbeat: whoever judges an expired one waits for as long first."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("runs", sa.Column("lease_s", sa.Float(), comment="how long that lease lasts without a heartbeat"))
    op.alter_column("runs", "due_at", comment="queued: since when; else: when the lease runs out")


def downgrade() -> None:
    op.alter_column("runs", "due_at", comment="queued: not before; else: when the lease runs out")
    op.drop_column("runs", "lease_s")
