"""The agents that requests name: those of the catalog, and those that tenants have made."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from weakref import WeakValueDictionary

import msgspec
from msgspec import Raw, Struct

from app.domain.agents import Agent, CreateAgent, NamedAgent, apply, is_agent_name, new_agent, updated
from app.domain.rights import Rights
from app.domain.sealed import Seal
from app.errors import (
    AgentNotFound,
    ApiError,
    BodyTooLarge,
    InvalidParameter,
    InvalidRequest,
    ModelNotAllowed,
    ServerError,
)
from app.ids import new_id, seconds_of
from app.offload import offload
from app.outbound.agents import check
from app.outbound.catalog import Catalog
from app.settings import Settings
from app.storage import agents, audit
from app.storage.agents import StoredAgent, Summary
from app.storage.database import Database, Tx
from app.storage.pages import Page
from app.wire.decoding import decode_stored
from app.wire.requests import CreateResponse, Order, ToolSecrets

ENTRY_BYTES = 1024
"""What an entry of the cache takes beside its agent, at most."""

_AGENT = msgspec.json.Decoder(Agent)
_SECRETS = msgspec.json.Decoder(dict[str, ToolSecrets])


class _Known(Struct, frozen=True):
    """What a tenant has under a name, and until when that is taken for true."""

    until: float
    agent: NamedAgent | None

    @property
    def bytes(self) -> int:
        """What it takes."""
        return ENTRY_BYTES + (self.agent.bytes if self.agent else 0)


class Agents:
    """Finds and changes agents. Those of tenants are remembered for REPRISE_AGENT_CACHE_S, and so is that there is none under a name:
    a request costs no query."""

    def __init__(self, settings: Settings, database: Database, catalog: Catalog, seal: Seal) -> None:
        self._settings, self._database, self._catalog, self._seal = settings, database, catalog, seal
        self._taken = frozenset(catalog.model_names)
        self._of_catalog = {
            name: NamedAgent(name, agent, len(msgspec.json.encode(agent)), id=name)
            for name, agent in sorted(catalog.agents.items())
        }
        self._known: dict[tuple[str, str], _Known] = {}
        self._known_bytes = 0
        self._writing: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    # -- For requests -----------------------------------------------------------------------------------------------------

    async def find(self, rights: Rights, name: str) -> NamedAgent | None:
        """The agent that requests name so; None if there is none, or a model of the catalog has the name.

        Raises ModelNotAllowed for one that the caller may not use; DatabaseUnavailable."""
        found = await self._find(rights.tenant, name)
        if found and not found.may_be_used(rights):
            raise ModelNotAllowed(name)
        return found

    async def all(self, rights: Rights) -> list[tuple[NamedAgent | Summary, bool]]:
        """Every agent that a request of the tenant may name, and whether the caller may."""
        async with self._database.autocommit() as tx:
            own = await agents.summaries(tx, rights.tenant, rights.user, described=True)
        named: list[NamedAgent | Summary] = [
            *self._shared_with(rights.tenant).values(),
            *(one for one in own if self._is_named(rights.tenant, one.name)),
        ]
        return [(one, _may_be_used(one, rights)) for one in named]

    async def applied(self, rights: Rights, request: CreateResponse) -> tuple[CreateResponse, NamedAgent | None]:
        """The request, with what the agent that it names gives, except for its messages; and the agent. Raises as `find`, and as `apply`;
        InvalidParameter for variables without an agent."""
        found = await self.find(rights, request.model)
        if found:
            size = found.bytes + request.size
            return await offload(size, apply, found, request, bytes_max=self._settings.body_bytes_max), found
        if request.body.agent:
            self._catalog.routes(request.model)
            rights.demand_model(request.model)
            raise InvalidParameter(f"The model '{request.model}' is no agent, so it has no variables.", param="agent")
        return request, None

    async def _find(self, tenant: str, name: str) -> NamedAgent | None:
        if found := self._shared(tenant, name):
            return found
        if not self._is_named(tenant, name):
            return None
        known = self._known.get((tenant, name))
        asked_at = time.monotonic()  # what changes while the answer arrives is not remembered longer than the rest
        if known and asked_at < known.until:
            return known.agent
        async with self._database.autocommit() as tx:
            stored = await agents.find_named(tx, tenant, name)
        made = _Known(asked_at + self._settings.agent_cache_s, self._opened(tenant, stored) if stored else None)
        self._remember(tenant, name, made)
        return made.agent

    def _shared(self, tenant: str, name: str) -> NamedAgent | None:
        """The catalog's agent of this name, if it is for the tenant. To others it does not exist: the name may be one of theirs."""
        found = self._of_catalog.get(name)
        return found if found and found.agent.is_for(tenant) else None

    def _shared_with(self, tenant: str) -> dict[str, NamedAgent]:
        return {name: one for name, one in self._of_catalog.items() if one.agent.is_for(tenant)}

    def _is_named(self, tenant: str, name: str) -> bool:
        """Whether a request that names this may mean an agent that the tenant has made."""
        return name not in self._taken and not self._shared(tenant, name) and is_agent_name(name)

    def _remember(self, tenant: str, name: str, made: _Known) -> None:
        self._forget(tenant, name)
        self._known[tenant, name] = made
        self._known_bytes += made.bytes
        while self._known_bytes > self._settings.agents_cached_bytes_max:
            self._forget(*next(iter(self._known)))

    def _forget(self, tenant: str, name: str) -> None:
        if known := self._known.pop((tenant, name), None):
            self._known_bytes -= known.bytes

    # -- For the API ------------------------------------------------------------------------------------------------------

    async def get(self, rights: Rights, id: str) -> NamedAgent:
        """An agent by its id, or by its name. Raises AgentNotFound; ModelNotAllowed for one that the caller may neither use nor
        administer."""
        found = self._shared(rights.tenant, id)
        if found is None:
            async with self._database.autocommit() as tx:
                found = self._opened(rights.tenant, await _stored(tx, rights.tenant, id), needs_secrets=False)
        if not _may_be_read(found, rights):
            raise ModelNotAllowed(id)
        return found

    async def page(
        self, rights: Rights, *, after: str | None, limit: int, order: Order, page_bytes: int, bytes_max: int
    ) -> tuple[int, Page[NamedAgent] | None]:
        """The agents that the caller may use or administer, by creation; those of the catalog are the oldest. It ends before it
        takes more than `page_bytes`. The first value is what it takes; there is no page if that is more than `bytes_max`.

        Raises InvalidParameter for a cursor that is no agent."""
        async with self._database.autocommit() as tx:
            own = await agents.summaries(tx, rights.tenant, rights.user, described=False)
        every: list[NamedAgent | Summary] = [*self._shared_with(rights.tenant).values(), *own]
        shown = [one for one in every if _may_be_read(one, rights)]
        if order == "desc":
            shown.reverse()
        rest = _after(shown, after, order)
        rows = _within(rest[:limit], page_bytes)
        size = sum(one.bytes for one in rows)
        if size > bytes_max:
            return size, None
        async with self._database.autocommit() as tx:
            stored = await agents.find_all(tx, rights.tenant, [one.id for one in rows if isinstance(one, Summary)])
        found = {one.id: self._opened(rights.tenant, one, needs_secrets=False) for one in stored}
        made = [self._of_catalog.get(one.id) or found.get(one.id) for one in rows]
        return size, Page([one for one in made if one], len(rest) > len(rows))

    async def create(self, rights: Rights, asked: CreateAgent) -> NamedAgent:
        """Make an agent. Raises InvalidRequest, ModelNotAllowed."""
        id = new_id("agent")
        made = await offload(self._settings.agent_bytes_max, new_agent, asked, id=id, now=seconds_of(id) or 0)
        await self._check(rights, made)
        stored, entry = self._closed(rights.tenant, made), audit.entry(rights, "agent.created", id)
        async for attempt in self._database.settling():
            with attempt:
                async with self._writer(rights.tenant), self._database.begin() as tx:
                    await agents.lock(tx, rights.tenant)
                    await agents.create(
                        tx, rights.tenant, stored, size=made.bytes, agents_max=self._settings.agents_tenant_max
                    )
                    await audit.write(tx, rights.tenant, entry)
        self._forget(rights.tenant, made.name)
        return made

    async def update(self, rights: Rights, id: str, given: Mapping[str, Raw]) -> NamedAgent:
        """Replace some of an agent's parameters; of two updates at once the later one sees what the earlier has made.

        Raises AgentNotFound, InvalidRequest, ModelNotAllowed."""
        self._refuse_shared(rights.tenant, id)
        entry, now = None, int(time.time())
        async for attempt in self._database.settling():
            with attempt:
                async with self._writer(rights.tenant), self._database.begin() as tx:
                    await agents.lock(tx, rights.tenant)
                    stored = await _stored(tx, rights.tenant, id)
                    before = self._opened(rights.tenant, stored, needs_secrets="tools" not in given)
                    made = await offload(self._settings.agent_bytes_max, updated, before, given, now=now)
                    await self._check(rights, made)
                    entry = entry or audit.entry(rights, "agent.updated", made.id)
                    await agents.update(tx, rights.tenant, self._closed(rights.tenant, made), size=made.bytes)
                    await audit.write(tx, rights.tenant, entry)
        self._forget(rights.tenant, before.name)
        self._forget(rights.tenant, made.name)
        return made

    async def delete(self, rights: Rights, id: str) -> str:
        """Delete an agent, and give its id. Raises AgentNotFound."""
        self._refuse_shared(rights.tenant, id)
        async with self._database.autocommit() as tx:
            stored = await _stored(tx, rights.tenant, id)
        entry = audit.entry(rights, "agent.deleted", stored.id)
        async for attempt in self._database.settling():
            with attempt:
                async with self._writer(rights.tenant), self._database.begin() as tx:
                    await agents.lock(tx, rights.tenant)
                    await agents.delete(tx, rights.tenant, stored.id, again=attempt.num > 1)
                    await audit.write(tx, rights.tenant, entry)
        self._forget(rights.tenant, stored.name)
        return stored.id

    def _writer(self, tenant: str) -> asyncio.Lock:
        """The turn of a tenant's writers in this process: else each would wait with a connection, of which there are few."""
        return self._writing.setdefault(tenant, asyncio.Lock())

    def _refuse_shared(self, tenant: str, id: str) -> None:
        if self._shared(tenant, id):
            raise InvalidRequest(f"The agent '{id}' is the catalog's, which no request changes.", param="agent_id")

    async def _check(self, rights: Rights, made: NamedAgent) -> None:
        if made.bytes > self._settings.agent_bytes_max:
            raise BodyTooLarge(
                f"The agent takes {made.bytes} bytes; at most {self._settings.agent_bytes_max} are possible."
            )
        await offload(made.bytes, self._compare, rights.tenant, made)
        rights.demand_model(made.agent.model)

    def _compare(self, tenant: str, made: NamedAgent) -> None:
        """Raises InvalidRequest for what the catalog does not have, or has under the same name."""
        if not self._is_named(tenant, made.name):
            raise InvalidParameter(
                f"The catalog has a model or an agent '{made.name}'.", param="name", code="name_taken"
            )
        if made.name == made.agent.model:
            raise InvalidParameter("The model of an agent can't be an agent, nor itself.", param="model")
        check(made, self._catalog, self._settings, self._shared_with(tenant))

    async def try_all(self, most: int) -> AsyncIterator[tuple[str, StoredAgent, ApiError | None]]:
        """Up to `most` agents that tenants have made, with their tenants, and what has become wrong with them: their secrets can't be
        opened, or the catalog lacks what they need. Raises DatabaseUnavailable."""
        tried = 0
        async for tenant, stored in agents.every(self._database):
            try:
                self._compare(tenant, self._opened(tenant, stored))
            except (InvalidRequest, ServerError) as error:
                yield tenant, stored, error
            else:
                yield tenant, stored, None
            tried += 1
            if tried == most:
                return

    # -- Rows -------------------------------------------------------------------------------------------------------------

    def _closed(self, tenant: str, agent: NamedAgent) -> StoredAgent:
        secrets = msgspec.json.encode(agent.secrets).decode() if agent.secrets else None
        users = agent.agent.users
        return StoredAgent(
            id=agent.id,
            name=agent.name,
            created_at=agent.created_at,
            updated_at=agent.updated_at,
            model=agent.agent.model,
            description=agent.agent.description,
            users=None if users is None else tuple(users),
            body=msgspec.json.encode(agent.agent).decode(),
            secrets=secrets and self._seal.of(tenant).close(secrets, "agent"),
        )

    def _opened(self, tenant: str, stored: StoredAgent, *, needs_secrets: bool = True) -> NamedAgent:
        """Raises ServerError if it needs its secrets, and these were sealed with another key."""
        secrets = stored.secrets and self._seal.of(tenant).open(stored.secrets, "agent")
        if stored.secrets and not secrets and needs_secrets:
            raise ServerError(
                f"The secrets of the agent '{stored.name}' can't be opened: the server's secret key has changed."
            )
        return NamedAgent(
            stored.name,
            decode_stored(_AGENT, stored.body),
            len(stored.body) + len(secrets or ""),
            secrets=_SECRETS.decode(secrets) if secrets else {},
            id=stored.id,
            created_at=stored.created_at,
            updated_at=stored.updated_at,
        )


async def _stored(tx: Tx, tenant: str, id: str) -> StoredAgent:
    """By its id, or its name. Raises AgentNotFound."""
    found = await (agents.find_named(tx, tenant, id) if is_agent_name(id) else agents.find(tx, tenant, id))
    if found is None:
        raise AgentNotFound(id)
    return found


def _may_be_used(agent: NamedAgent | Summary, rights: Rights) -> bool:
    if isinstance(agent, NamedAgent):
        return agent.may_be_used(rights)
    return agent.is_for_user and rights.may_use(agent.name)


def _may_be_read(agent: NamedAgent | Summary, rights: Rights) -> bool:
    """Administrators read what they may not use."""
    is_own = isinstance(agent, Summary) or agent.id != agent.name
    return (is_own and "admin" in rights.scopes) or _may_be_used(agent, rights)


def _after(agents: Sequence[NamedAgent | Summary], after: str | None, order: Order) -> Sequence[NamedAgent | Summary]:
    """Those after the cursor, whose agent may have been deleted. Raises InvalidParameter."""
    if after is None:
        return agents
    at = next((at for at, one in enumerate(agents) if one.id == after), None)
    if at is not None:
        return agents[at + 1 :]
    if not after.startswith("agent_") or seconds_of(after) is None:
        raise InvalidParameter(f"There is no agent with id '{after}'.", param="after")
    key = (True, after)
    return [one for one in agents if (_place(one) > key if order == "asc" else _place(one) < key)]


def _place(agent: NamedAgent | Summary) -> tuple[bool, str]:
    """Its place by creation: those of the catalog come first."""
    return isinstance(agent, Summary), agent.id


def _within(agents: Sequence[NamedAgent | Summary], bytes_max: int) -> Sequence[NamedAgent | Summary]:
    """As many as take no more bytes, and one at least."""
    size = 0
    for count, one in enumerate(agents):
        size += one.bytes
        if size > bytes_max and count:
            return agents[:count]
    return agents
