"""Responses by place, in an index that can't be mistaken for that of their ids."""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

BY_TENANT = "responses_tenant_id_thread_id_turn_key"
BY_THREAD = "responses_thread_id_tenant_id_turn_key"


def upgrade() -> None:
    op.drop_index(BY_TENANT, "responses")
    op.create_index(BY_THREAD, "responses", ["thread_id", "tenant_id", "turn"], unique=True)


def downgrade() -> None:
    op.drop_index(BY_THREAD, "responses")
    op.create_index(BY_TENANT, "responses", ["tenant_id", "thread_id", "turn"], unique=True)
