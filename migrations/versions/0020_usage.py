"""The usage of runs: a row for each that has ended lately, and sums by day.

Runs that processes of the version before end during the update are not counted.
"""

import sqlalchemy as sa
from alembic import op

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None

TOKENS = ("input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens")
COST = "in trillionths of the currency"


def upgrade() -> None:
    op.create_table(
        "usage_ledger",
        sa.Column("tenant_id", sa.Text(), primary_key=True, comment="the tenant, also for what its users do"),
        sa.Column("id", sa.Text(), primary_key=True, comment="of the response, or of a count of tokens"),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now()),
        sa.Column("user_name", sa.Text(), nullable=False, comment="empty: none"),
        sa.Column("model", sa.Text(), nullable=False, comment="as the request named it"),
        sa.Column("key_id", sa.Text(), nullable=False, comment="empty: none"),
        sa.Column("currency", sa.Text(), nullable=False),
        sa.Column("run_count", sa.Integer(), nullable=False, comment="1; 0: it was no run"),
        sa.Column("tool_calls", sa.Integer(), nullable=False, comment="that this server has made"),
        *(sa.Column(name, sa.BigInteger(), nullable=False) for name in TOKENS),
        sa.Column("cost", sa.Numeric(), nullable=False, comment=COST),
    )
    op.create_index("usage_ledger_ended_at_idx", "usage_ledger", ["ended_at"])
    op.create_table(
        "usage_days",
        sa.Column("tenant_id", sa.Text(), primary_key=True),
        sa.Column("day", sa.Date(), primary_key=True, comment="in UTC, on which the runs have ended"),
        *(sa.Column(name, sa.Text(), primary_key=True) for name in ("model", "key_id", "user_name", "currency")),
        *(sa.Column(name, sa.Numeric(), nullable=False) for name in ("run_count", "tool_calls", *TOKENS)),
        sa.Column("cost", sa.Numeric(), nullable=False, comment=COST),
    )


def downgrade() -> None:
    op.drop_table("usage_days")
    op.drop_table("usage_ledger")
