"""Quotas of tenants and keys, and what background runs have reserved of them.

The columns have no default, so nothing is rewritten. Processes of the version before take no quotas and settle none: until they have
stopped, their requests do not count.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table in ("tenants", "keys"):
        op.add_column(
            table,
            sa.Column("limits", postgresql.JSONB(), comment="its quotas, by name; null: as the settings have them"),
        )
    op.add_column(
        "runs",
        sa.Column(
            "reserved_tokens",
            sa.BigInteger(),
            comment="of its quotas; null: it has taken nothing that is to be settled",
        ),
    )


def downgrade() -> None:
    op.drop_column("runs", "reserved_tokens")
    for table in ("keys", "tenants"):
        op.drop_column(table, "limits")
