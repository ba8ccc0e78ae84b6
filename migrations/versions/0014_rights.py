"""Keys with scopes, models, users and an expiry; secrets that a rotation has retired; the audit log.

Keys that exist read and write, use every model and do not expire. Processes of the version before read a key's hash only: they do not
know retired secrets, and give every key the rights of those.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


# The version before would give them the rights of every key.
REVOKE_RESTRICTED = """
update keys set revoked_at = now()
where revoked_at is null
  and (user_name <> '' or models is not null or expires_at is not null
       or not scopes @> array['responses.read', 'responses.write'])
"""

# Of users that were there before a downgrade, which keeps their data.
NAME_TENANTS = "update tenants set tenant = split_part(id, chr(31), 1) where strpos(id, chr(31)) > 0"


def upgrade() -> None:
    op.add_column("tenants", sa.Column("tenant", sa.Text(), comment="of a user its tenant; else null"))
    op.execute(NAME_TENANTS)
    op.alter_column(
        "tenants",
        "id",
        comment="a tenant, or one user of it: what rows have as their tenant_id",
        existing_type=sa.Text(),
    )
    op.create_index("tenants_tenant_idx", "tenants", ["tenant"], postgresql_where=sa.text("tenant is not null"))
    op.add_column(
        "keys",
        sa.Column(
            "user_name",
            sa.Text(),
            nullable=False,
            server_default=sa.text("''"),
            comment="empty: it is bound to no user",
        ),
    )
    op.add_column(
        "keys",
        sa.Column(
            "scopes",
            postgresql.ARRAY(sa.Text()),
            nullable=False,
            server_default=sa.text("array['responses.read', 'responses.write']"),
        ),
    )
    op.add_column("keys", sa.Column("models", postgresql.ARRAY(sa.Text()), comment="names or patterns; null: all"))
    op.add_column("keys", sa.Column("expires_at", sa.DateTime(timezone=True)))
    op.create_index("keys_tenant_id_id_idx", "keys", ["tenant_id", "id"])
    op.create_check_constraint("keys_names_check", "keys", r"concat(tenant_id, user_name) !~ '[\x01-\x1f]'")
    op.create_table(
        "retired_secrets",
        sa.Column("hash", sa.LargeBinary(), primary_key=True, comment="SHA-256 of a secret that its key had before"),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("key_id", sa.Text(), sa.ForeignKey("keys.id", name="retired_secrets_key_id_fkey"), nullable=False),
        sa.Column("valid_until", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_index("retired_secrets_key_id_idx", "retired_secrets", ["key_id"])
    op.create_table(
        "audit_log",
        sa.Column("tenant_id", sa.Text(), primary_key=True, comment="the tenant, also for what its users do"),
        sa.Column("id", sa.Text(), primary_key=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False, comment="unix seconds"),
        sa.Column("actor", sa.Text(), nullable=False, comment="api_key, command_line, anonymous"),
        sa.Column("key_id", sa.Text()),
        sa.Column("user_name", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("target", sa.Text(), nullable=False, comment="the id of what was acted on"),
    )


def downgrade() -> None:
    op.drop_table("audit_log")
    op.drop_table("retired_secrets")
    op.execute(REVOKE_RESTRICTED)
    op.drop_constraint("keys_names_check", "keys")
    op.drop_index("keys_tenant_id_id_idx", "keys")
    for name in ("expires_at", "models", "scopes", "user_name"):
        op.drop_column("keys", name)
    op.drop_index("tenants_tenant_idx", "tenants")
    op.drop_column("tenants", "tenant")
    op.alter_column("tenants", "id", comment=None, existing_type=sa.Text())
