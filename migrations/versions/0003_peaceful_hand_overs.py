"""Owners that gave a run back in peace: they do not count as attempts."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "runs",
        sa.Column(
            "handed_over",
            sa.Integer(),
            nullable=False,
            server_default=sa.text("0"),
            comment="owners that gave it back in peace",
        ),
    )


def downgrade() -> None:
    op.drop_column("runs", "handed_over")
