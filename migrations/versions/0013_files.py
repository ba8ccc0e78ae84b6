"""Uploaded files: what they are, and their content in pieces.

Processes of the version before never read the new tables.
"""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "files",
        sa.Column("tenant_id", sa.Text(), primary_key=True),
        sa.Column("id", sa.Text(), primary_key=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False, comment="unix seconds"),
        sa.Column("filename", sa.Text(), nullable=False),
        sa.Column("purpose", sa.Text(), comment="null while it is uploaded: then it is no file yet"),
        sa.Column("bytes", sa.BigInteger(), nullable=False, comment="those that are stored"),
        sa.Column("written_at", sa.DateTime(timezone=True), nullable=False, comment="when its last piece was stored"),
        postgresql_with={"fillfactor": "85"},
    )
    op.create_index("files_uploads_idx", "files", ["written_at"], postgresql_where=sa.text("purpose is null"))
    op.create_table(
        "file_pieces",
        sa.Column("tenant_id", sa.Text(), primary_key=True),
        sa.Column("file_id", sa.Text(), primary_key=True),
        sa.Column("number", sa.Integer(), primary_key=True, comment="from 0; all but the last have PIECE_BYTES"),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant_id", "file_id"],
            ["files.tenant_id", "files.id"],
            name="file_pieces_tenant_id_fkey",
            ondelete="CASCADE",
        ),
    )
    # Files are compressed as a rule: Postgres need not try again.
    op.execute("alter table file_pieces alter column data set storage external")


def downgrade() -> None:
    op.drop_table("file_pieces")
    op.drop_table("files")
