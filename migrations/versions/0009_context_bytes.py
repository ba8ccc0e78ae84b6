"""What a response's context takes in bytes, so that it can be refused, or wait, before it is read.

Responses from before are measured when they are continued; nothing is filled in here.
"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "responses",
        sa.Column(
            "context_bytes",
            sa.BigInteger(),
            comment="of the items of its context and its own; null where that was not counted yet",
        ),
    )


def downgrade() -> None:
    op.drop_column("responses", "context_bytes")
