"""What a tenant has stored, as it was last measured: only for tenants with a limit of that."""

import sqlalchemy as sa
from alembic import op

revision = "0022"
down_revision = "0021"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("tenants", sa.Column("stored_bytes", sa.BigInteger(), comment="as last measured; null: never"))
    op.add_column(
        "tenants",
        sa.Column("measured_at", sa.DateTime(timezone=True), comment="when a process last began to, or the next may"),
    )


def downgrade() -> None:
    op.drop_column("tenants", "measured_at")
    op.drop_column("tenants", "stored_bytes")
