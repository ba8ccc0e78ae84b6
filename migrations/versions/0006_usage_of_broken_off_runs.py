"""What the turns took that former owners of a run have made."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSON

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("runs", sa.Column("usage", JSON(), comment="of the turns that the journal holds"))


def downgrade() -> None:
    op.drop_column("runs", "usage")
