"""Agents that tenants make by API."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "agents",
        sa.Column("tenant_id", sa.Text(), primary_key=True, comment="the tenant: its users share agents"),
        sa.Column("id", sa.Text(), primary_key=True),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False, comment="unix seconds"),
        sa.Column("updated_at", sa.BigInteger(), nullable=False, comment="unix seconds"),
        sa.Column(
            "model", sa.Text(), nullable=False, comment="like the next two for lists, which do not read the body"
        ),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("users", postgresql.ARRAY(sa.Text()), comment="whose keys may use it; null: all"),
        sa.Column("body", sa.JSON(), nullable=False, comment="its definition without the secrets of its tools"),
        sa.Column("secrets", sa.Text(), comment="these, sealed"),
        sa.Column("bytes", sa.Integer(), nullable=False, comment="of the definition with the secrets"),
        sa.UniqueConstraint("tenant_id", "name", name="agents_tenant_id_name_key"),
    )


def downgrade() -> None:
    op.drop_table("agents")
