"""A run knows the key that asked for it, also after another process has taken it over.

The column has no default, so nothing is rewritten; processes of the version before leave it null.
"""

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "runs",
        sa.Column("key_id", sa.Text(), comment="of the key that asked for it, which may be revoked; null without one"),
    )


def downgrade() -> None:
    op.drop_column("runs", "key_id")
