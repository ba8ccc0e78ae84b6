"""The events of an ended response lie in pages, so that a replay need not hold all of them. Those of before stay one page each."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("event_archive", sa.Column("first_number", sa.BigInteger(), nullable=False, server_default="0"))
    op.alter_column("event_archive", "frames", comment="a page of the events of an ended response, zstd")
    op.drop_constraint("event_archive_pkey", "event_archive")
    op.create_primary_key("event_archive_pkey", "event_archive", ["tenant_id", "response_id", "first_number"])


def downgrade() -> None:
    # Only whole archives can be read by what was before.
    op.execute(
        "delete from event_archive archive where exists (select from event_archive page where page.first_number > 0"
        " and page.tenant_id = archive.tenant_id and page.response_id = archive.response_id)"
    )
    op.drop_constraint("event_archive_pkey", "event_archive")
    op.drop_column("event_archive", "first_number")
    op.alter_column("event_archive", "frames", comment="every event of an ended response, zstd")
    op.create_primary_key("event_archive_pkey", "event_archive", ["tenant_id", "response_id"])
