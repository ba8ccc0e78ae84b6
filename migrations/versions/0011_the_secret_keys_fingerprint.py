"""Which secret key seals: a process with another one does not start."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "sealing",
        sa.Column("is_only", sa.Boolean(), server_default=sa.true(), nullable=False),
        sa.Column("fingerprint", sa.Text(), nullable=False, comment="of the secret key, which is kept nowhere"),
        sa.CheckConstraint("is_only", name="sealing_one_row"),
        sa.PrimaryKeyConstraint("is_only", name="sealing_pkey"),
    )


def downgrade() -> None:
    op.drop_table("sealing")
