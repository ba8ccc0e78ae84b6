"""Credentials for tool servers, sealed, of tenants, users and keys."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "tool_credentials",
        sa.Column("tenant_id", sa.Text(), primary_key=True, comment="the tenant, also of what is for one of its users"),
        sa.Column("id", sa.Text(), primary_key=True),
        sa.Column("server", sa.Text(), nullable=False, comment="a normalized URL, or a server's name in the catalog"),
        sa.Column("server_hash", sa.LargeBinary(), nullable=False, comment="SHA-256 of it"),
        sa.Column("user_name", sa.Text(), nullable=False, comment="whose runs get it; empty: it is not for a user"),
        sa.Column("key_id", sa.Text(), nullable=False, comment="whose runs get it; empty: it is not for a key"),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("sealed", sa.Text(), nullable=False, comment="authorization and headers, with what they are for"),
        sa.Column("has_authorization", sa.Boolean(), nullable=False),
        sa.Column("header_names", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False, comment="unix seconds"),
        sa.Column("updated_at", sa.BigInteger(), nullable=False, comment="unix seconds"),
        sa.CheckConstraint("user_name = '' or key_id = ''", name="tool_credentials_holder_check"),
    )
    op.create_index(
        "tool_credentials_server_idx",
        "tool_credentials",
        ["server_hash", "tenant_id", "user_name", "key_id"],
        unique=True,
    )


def downgrade() -> None:
    op.drop_table("tool_credentials")
