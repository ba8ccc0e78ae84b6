"""`/v1/admin`: the keys of the caller's tenant, and its audit log."""

from typing import Any

from litestar import Controller, Request, Response, delete, get, post
from msgspec import UNSET

from app.api import pages, queries
from app.api.replies import small_reply
from app.api.services import Services
from app.domain.rights import ORDINARY
from app.runs.admission import Caller
from app.storage import audit, keys
from app.storage.audit import Entry
from app.storage.keys import Key
from app.wire import admin as wire
from app.wire.resources import Deleted


class KeysController(Controller):
    """Keys of the caller's own tenant."""

    path = "/v1/admin/keys"
    opt = {"scope": "admin"}

    @post(status_code=200)
    async def create(self, request: Request[Any, Any, Any], caller: Caller, services: Services) -> Response[bytes]:
        """A new key. Only this reply has its secret."""
        asked = await services.bodies.decoded(request, wire.CREATE_KEY)
        return await made_key(services, caller, caller.rights.tenant, asked)

    @get(opt=queries.TAKEN)
    async def list(self, request: Request[Any, Any, Any], caller: Caller, services: Services) -> Response[Any]:
        """Keys by creation, also revoked and expired ones."""
        query = queries.parse(request, queries.KeyPage)
        return await pages.resources(services, query, keys.list_keys, caller.rights.tenant, show=_shown)

    @get("/{key_id:str}")
    async def retrieve(self, key_id: str, caller: Caller, services: Services) -> Response[bytes]:
        """One key."""
        async with services.database.autocommit() as tx:
            return _reply(await keys.get_key(tx, caller.rights.tenant, key_id))

    @post("/{key_id:str}", status_code=200)
    async def update(
        self, request: Request[Any, Any, Any], key_id: str, caller: Caller, services: Services
    ) -> Response[bytes]:
        """Change a key that is not revoked. What it owns, and who it is bound to, stays."""
        asked = await services.bodies.decoded(request, wire.UPDATE_KEY)
        entry = audit.entry(caller.rights, "key.updated", key_id)
        async for attempt in services.database.settling():
            with attempt:
                async with services.database.begin() as tx:
                    key = await keys.update_key(tx, caller.rights.tenant, key_id, asked)
                    caller.rights.demand_grantable(
                        frozenset() if asked.scopes is UNSET else key.scopes,
                        () if asked.models is UNSET else key.models,
                    )
                    await audit.write(tx, key.tenant, entry)
        return _reply(key)

    @post("/{key_id:str}/rotate", status_code=200)
    async def rotate(
        self, request: Request[Any, Any, Any], key_id: str, caller: Caller, services: Services
    ) -> Response[bytes]:
        """A new secret, which only this reply has; those that it had stay valid for at most `overlap_s`."""
        asked = await services.bodies.decoded(request, wire.ROTATE_KEY)
        overlap_s = services.settings.key_overlap_s if asked.overlap_s is None else asked.overlap_s
        secret, entry = keys.new_secret(), audit.entry(caller.rights, "key.rotated", key_id)
        async for attempt in services.database.settling():
            with attempt:
                async with services.database.begin() as tx:
                    key = await keys.rotate_key(tx, caller.rights.tenant, key_id, secret, overlap_s=overlap_s)
                    caller.rights.demand_grantable(key.scopes, key.models)  # who rotates a key can use it
                    await audit.write(tx, key.tenant, entry)
        return _reply(key, secret)

    @delete("/{key_id:str}", status_code=200)
    async def revoke(self, key_id: str, caller: Caller, services: Services) -> Response[bytes]:
        """Revoke a key; it stays in the list."""
        entry = audit.entry(caller.rights, "key.revoked", key_id)
        async for attempt in services.database.settling():
            with attempt:
                async with services.database.begin() as tx:
                    await keys.revoke_key(tx, caller.rights.tenant, key_id, again=attempt.num > 1)
                    await audit.write(tx, caller.rights.tenant, entry)
        return small_reply(Deleted(key_id, "api_key.deleted"))


class AuditController(Controller):
    """The audit log of the caller's own tenant."""

    path = "/v1/admin/audit"
    opt = {"scope": "admin"}

    @get(opt=queries.TAKEN)
    async def list(self, request: Request[Any, Any, Any], caller: Caller, services: Services) -> Response[Any]:
        """What was done, by time."""
        query = queries.parse(request, queries.AuditPage)
        return await pages.resources(
            services, query, audit.list_entries, caller.rights.tenant, query.type, show=_listed
        )


async def made_key(
    services: Services, caller: Caller, tenant: str, asked: wire.CreateKey, *, as_operator: bool = False
) -> Response[bytes]:
    """A reply with a new key of a tenant, and its secret. Raises InvalidParameter, MissingScope, ModelNotAllowed."""
    key = keys.new_key(
        tenant,
        user=asked.user or "",
        name=asked.name,
        scopes=ORDINARY if asked.scopes is None else frozenset(asked.scopes),
        models=None if asked.models is None else tuple(asked.models),
        limits=asked.limits,
        expires_at=asked.expires_at,
    )
    caller.rights.demand_grantable(key.scopes, key.models)
    secret, entry = keys.new_secret(), audit.entry(caller.rights, "key.created", key.id, as_operator=as_operator)
    async for attempt in services.database.settling():
        with attempt:
            async with services.database.begin() as tx:
                await keys.create_key(tx, key, secret, by=caller.rights)
                await audit.write(tx, key.tenant, entry)
    return _reply(key, secret)


def _shown(key: Key) -> wire.ApiKey:
    return wire.ApiKey(
        id=key.id,
        name=key.name,
        tenant=key.tenant,
        user=key.user or None,
        scopes=sorted(key.scopes),
        models=None if key.models is None else list(key.models),
        limits=key.limits,
        created_at=key.created_at,
        expires_at=key.expires_at,
        revoked_at=key.revoked_at,
    )


def _reply(key: Key, secret: str | None = None) -> Response[bytes]:
    shown = _shown(key)
    if secret is not None:
        shown.value = secret
    return small_reply(shown, {"cache-control": "no-store"})


def _listed(entry: Entry) -> wire.AuditEntry:
    actor = wire.AuditActor(entry.actor, entry.key_id, entry.user or None)
    return wire.AuditEntry(
        id=entry.id, type=entry.action, effective_at=entry.created_at, actor=actor, target=entry.target
    )
