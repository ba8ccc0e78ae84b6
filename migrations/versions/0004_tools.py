"""Tools that the server runs: approvals, and the secrets of background runs."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # What was sealed under the old name has another form: runs that are under way with a key of their own end as failed.
    op.drop_column("runs", "caller_key")
    op.add_column(
        "runs",
        sa.Column(
            "secrets",
            sa.Text(),
            comment="the caller's key and those of tool servers, sealed; kept only while the run lives",
        ),
    )
    op.create_table(
        "approvals",
        sa.Column("tenant_id", sa.Text(), primary_key=True),
        sa.Column(
            "request_id", sa.Text(), primary_key=True, comment="of the item that asked; its call is made once at most"
        ),
        sa.Column("approve", sa.Boolean(), nullable=False),
        sa.Column("response_id", sa.Text(), nullable=False, comment="whose input has answered"),
    )


def downgrade() -> None:
    op.drop_table("approvals")
    op.drop_column("runs", "secrets")
    op.add_column("runs", sa.Column("caller_key", sa.Text(), comment="sealed; kept only while the run lives"))
