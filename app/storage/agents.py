"""Agents that tenants have made. Writers of one tenant wait for each other, so that names and numbers are checked exactly."""

from collections.abc import AsyncIterator, Sequence

from msgspec import Struct
from sqlalchemy import text

from app.domain.sealed import Seal
from app.errors import AgentNotFound, InvalidParameter, InvalidRequest
from app.storage.database import Database, Query, Row, Tx, storable
from app.storage.sealed_rows import Resealed, read_all

_COLUMNS = "id, name, created_at, updated_at, model, description, users, body, secrets"

_LOCK = Query(text("select pg_advisory_xact_lock(hashtextextended('agents ' || cast(:tenant_id as text), 0))"))

_FIND = Query(text(f"select {_COLUMNS} from agents where tenant_id = :tenant_id and name = :name"))

_GET = Query(text(f"select {_COLUMNS} from agents where tenant_id = :tenant_id and id = :id"))

_SUMMARIES = Query(
    text("""
    select id, name, created_at, updated_at, model, bytes, is_for_user,
           case when is_for_user and :described then description else '' end as description
    from agents cross join lateral (select users is null or :user = any(users) as is_for_user) asked
    where tenant_id = :tenant_id order by id
    """)
)

_SOME = Query(
    text(f"select {_COLUMNS} from agents where tenant_id = :tenant_id and id = any(cast(:ids as text[])) order by id")
)

_NAMES = Query(
    text("""
    select count(*) as agents, max(id) filter (where name = :name) as named, max(id) filter (where name = :model) as model
    from agents where tenant_id = :tenant_id
    """)
)

_INSERT = Query(
    text("""
    insert into agents (tenant_id, id, name, created_at, updated_at, model, description, users, body, secrets, bytes)
    values (:tenant_id, :id, :name, :created_at, :updated_at, :model, :description, cast(:users as text[]),
            cast(:body as json), :secrets, :bytes)
    on conflict do nothing  -- by an earlier attempt
    """)
)

_UPDATE = Query(
    text("""
    update agents set name = :name, updated_at = :updated_at, model = :model, description = :description,
        users = cast(:users as text[]), body = cast(:body as json), secrets = :secrets, bytes = :bytes
    where tenant_id = :tenant_id and id = :id
    """)
)

_SEALED = Query(
    text("""
    select tenant_id, id, secrets from agents
    where (tenant_id, id) > (:after_tenant, :after_id) and secrets is not null order by tenant_id, id limit :limit
    """),
    across_tenants="the operator seals all of them with another key",
)

_EVERY = Query(
    text(f"""
    select tenant_id, {_COLUMNS} from agents
    where (tenant_id, id) > (:after_tenant, :after_id) order by tenant_id, id limit :limit
    """),
    across_tenants="the operator asks whether the catalog has what they need",
)

_RESEAL = Query(
    text("update agents set secrets = :sealed where tenant_id = :tenant_id and id = :id and secrets = :former")
)

_DELETE = Query(text("delete from agents where tenant_id = :tenant_id and id = :id returning id"))


class Summary(Struct, frozen=True, kw_only=True):
    """What lists need of an agent. Times are unix seconds."""

    id: str
    name: str
    created_at: int
    updated_at: int
    model: str
    description: str
    """Of one that is not for the user, or was read without it, empty."""
    is_for_user: bool
    """Whether it is for the user who asks."""
    bytes: int
    """Of the body with the secrets."""


class StoredAgent(Struct, frozen=True, kw_only=True):
    """An agent's row."""

    id: str
    name: str
    created_at: int
    updated_at: int
    model: str
    description: str
    users: tuple[str, ...] | None
    body: str
    """Its definition as JSON, without the secrets of its tools."""
    secrets: str | None
    """These, sealed."""


async def lock(tx: Tx, tenant: str) -> None:
    """Let no other write agents of this tenant until the end of the transaction."""
    await tx.one(_LOCK, tenant_id=tenant)


async def find_named(tx: Tx, tenant: str, name: str) -> StoredAgent | None:
    """The agent of this name."""
    row = await tx.one(_FIND, tenant_id=tenant, name=name) if storable(name) else None
    return _agent(row) if row else None


async def find(tx: Tx, tenant: str, id: str) -> StoredAgent | None:
    """The agent with this id."""
    row = await tx.one(_GET, tenant_id=tenant, id=id) if storable(id) else None
    return _agent(row) if row else None


async def summaries(tx: Tx, tenant: str, user: str, *, described: bool) -> list[Summary]:
    """Every agent of a tenant, the oldest first; there are at most REPRISE_AGENTS_TENANT_MAX. `user` asks, empty for none. What is long is
    not read: whom else they are for, and, unless they are to be `described`, their descriptions."""
    rows = await tx.all(_SUMMARIES, tenant_id=tenant, user=user, described=described)
    return [Summary(**row) for row in rows]


async def find_all(tx: Tx, tenant: str, ids: Sequence[str]) -> list[StoredAgent]:
    """Those of these agents that are still there, the oldest first."""
    return [_agent(row) for row in await tx.all(_SOME, tenant_id=tenant, ids=list(ids))] if ids else []


async def create(tx: Tx, tenant: str, agent: StoredAgent, *, size: int, agents_max: int) -> None:
    """Store a new agent. Needs `lock`. Raises InvalidParameter for a name that is taken and for a model that is an agent,
    InvalidRequest if the tenant has `agents_max` already."""
    names = await _names(tx, tenant, agent)
    if names["named"] == agent.id:
        return  # an earlier attempt has stored it
    _check_names(names, agent)
    if names["agents"] >= agents_max:
        raise InvalidRequest(
            f"There are {agents_max} agents already (REPRISE_AGENTS_TENANT_MAX); delete some first.",
            code="agents_limit_exceeded",
        )
    await tx.one(_INSERT, tenant_id=tenant, bytes=size, **_binds(agent))


async def update(tx: Tx, tenant: str, agent: StoredAgent, *, size: int) -> None:
    """Replace a stored agent. Needs `lock`. Raises InvalidParameter as `create`."""
    _check_names(await _names(tx, tenant, agent), agent)
    binds = _binds(agent)
    del binds["created_at"]
    await tx.one(_UPDATE, tenant_id=tenant, bytes=size, **binds)


async def delete(tx: Tx, tenant: str, id: str, *, again: bool = False) -> None:
    """Delete an agent. `again` if an earlier attempt may have done it. Raises AgentNotFound."""
    row = await tx.one(_DELETE, tenant_id=tenant, id=id)
    if row is None and not again:
        raise AgentNotFound(id)


async def reseal_all(database: Database, seal: Seal) -> Resealed:
    """Seal the secrets of all tenants' agents with the key that seals now; those that none of the keys opens stay as they are. Raises
    DatabaseUnavailable."""
    resealed = unopened = 0
    async for row in read_all(database, _SEALED):
        tenant = row["tenant_id"]
        secrets = seal.of(tenant).open(row["secrets"], "agent")
        if secrets is None:
            unopened += 1
            continue
        sealed = seal.of(tenant).close(secrets, "agent")
        async with database.autocommit() as tx:
            # An agent that is updated meanwhile is sealed by a server, with the key that this has.
            await tx.one(_RESEAL, tenant_id=tenant, id=row["id"], sealed=sealed, former=row["secrets"])
        resealed += 1
    return Resealed(resealed, unopened)


async def every(database: Database) -> AsyncIterator[tuple[str, StoredAgent]]:
    """The agents of all tenants, each with its tenant. Raises DatabaseUnavailable."""
    async for row in read_all(database, _EVERY):
        columns = dict(row)
        yield columns.pop("tenant_id"), _agent(columns)


async def _names(tx: Tx, tenant: str, agent: StoredAgent) -> Row:
    row = await tx.one(_NAMES, tenant_id=tenant, name=agent.name, model=agent.model)
    assert row
    return row


def _check_names(names: Row, agent: StoredAgent) -> None:
    if names["named"] not in {None, agent.id}:
        raise InvalidParameter(f"There is an agent '{agent.name}' already.", param="name", code="name_taken")
    if names["model"] not in {None, agent.id}:
        raise InvalidParameter(f"'{agent.model}' is an agent; the model of an agent can't be one.", param="model")


def _binds(agent: StoredAgent) -> dict[str, object]:
    return {name: getattr(agent, name) for name in StoredAgent.__struct_fields__}


def _agent(row: Row) -> StoredAgent:
    return StoredAgent(**{**row, "users": _users(row)})


def _users(row: Row) -> tuple[str, ...] | None:
    return None if row["users"] is None else tuple(row["users"])
