"""`/v1/tool_credentials`: create, list, retrieve, update, delete. No reply has a secret."""

import time
from typing import Any

from litestar import Controller, Request, Response, delete, get, post

from app.api import pages, queries
from app.api.replies import small_reply
from app.api.services import Services
from app.domain.rights import has_controls
from app.domain.tool_credentials import Secret, demand_managed, holder_for, manages_all, own_key_of, seal_secret
from app.errors import InvalidParameter, ToolCredentialNotFound
from app.ids import new_id
from app.outbound.credentials import check_label, checked_secret, server_of_url
from app.runs.admission import Caller
from app.storage import audit, tool_credentials
from app.storage.tool_credentials import Limits, Sealed, ToolCredential, Viewer
from app.wire import tool_credentials as wire
from app.wire.resources import Deleted


class ToolCredentialsController(Controller):
    """Credentials of the caller's tenant: those that the caller's own runs may use, and for administrators all."""

    path = "/v1/tool_credentials"
    opt = {"or_admin": True}

    @post(status_code=200)
    async def create(self, request: Request[Any, Any, Any], caller: Caller, services: Services) -> Response[bytes]:
        """A new credential."""
        asked = await services.bodies.decoded(request, wire.CREATE_TOOL_CREDENTIAL)
        rights, settings = caller.rights, services.settings
        _check_name(asked.name)
        if (asked.server_url is None) == (asked.server_label is None):
            raise InvalidParameter("Give either 'server_url' or 'server_label'.", param="server_url")
        holder = holder_for(rights, asked.user, asked.key_id)
        secret = checked_secret(asked.authorization, asked.headers, settings)
        if asked.server_label is not None:
            check_label(asked.server_label, services.catalog, secret)
        server = asked.server_label or server_of_url(asked.server_url or "")
        id, now = new_id("cred"), int(time.time())
        made = ToolCredential(
            id, server, holder, asked.name, bool(secret.authorization), sorted(secret.headers), now, now
        )
        sealed = seal_secret(services.seal.of(rights.tenant), server, holder, secret)
        entry = audit.entry(rights, "tool_credential.created", id)
        limits = Limits(settings.tool_credentials_tenant_max, settings.tool_credentials_holder_max)
        async for attempt in services.database.settling():
            with attempt:
                async with services.database.begin() as tx:
                    await tool_credentials.create(tx, rights.tenant, made, sealed, limits)
                    await audit.write(tx, rights.tenant, entry)
        return small_reply(_shown(made))

    @get(opt=queries.TAKEN)
    async def list(self, request: Request[Any, Any, Any], caller: Caller, services: Services) -> Response[Any]:
        """Credentials by creation."""
        query = queries.parse(request, queries.ToolCredentialPage)
        return await pages.resources(services, query, tool_credentials.list_all, _viewer(caller), show=_shown)

    @get("/{credential_id:str}")
    async def retrieve(self, credential_id: str, caller: Caller, services: Services) -> Response[bytes]:
        """One credential."""
        async with services.database.autocommit() as tx:
            return small_reply(_shown(await tool_credentials.get(tx, _viewer(caller), credential_id)))

    @post("/{credential_id:str}", status_code=200)
    async def update(
        self, request: Request[Any, Any, Any], credential_id: str, caller: Caller, services: Services
    ) -> Response[bytes]:
        """Another secret, or another name. Server and holder stay."""
        asked = await services.bodies.decoded(request, wire.UPDATE_TOOL_CREDENTIAL)
        _check_name(asked.name or "")
        secret: Secret | None = None
        if asked.authorization is not None or asked.headers is not None:
            secret = checked_secret(asked.authorization, asked.headers, services.settings)
        tenant, now = caller.rights.tenant, int(time.time())
        entry = audit.entry(caller.rights, "tool_credential.updated", credential_id)
        async for attempt in services.database.settling():
            with attempt:
                async with services.database.begin() as tx:
                    known = await tool_credentials.get(tx, _viewer(caller), credential_id)
                    demand_managed(caller.rights, known.holder)
                    updated = await tool_credentials.update(
                        tx, tenant, known.id, name=asked.name, secret=_sealed(services, tenant, known, secret), now=now
                    )
                    await audit.write(tx, tenant, entry)
        return small_reply(_shown(updated))

    @delete("/{credential_id:str}", status_code=200)
    async def remove(self, credential_id: str, caller: Caller, services: Services) -> Response[bytes]:
        """Delete a credential: runs that begin from now on do not have it."""
        tenant = caller.rights.tenant
        entry = audit.entry(caller.rights, "tool_credential.deleted", credential_id)
        async for attempt in services.database.settling():
            with attempt:
                async with services.database.begin() as tx:
                    known = await tool_credentials.find_one(tx, _viewer(caller), credential_id)
                    if known is None and attempt.num == 1:  # later, an earlier attempt may have deleted it
                        raise ToolCredentialNotFound(credential_id)
                    if known is not None:
                        demand_managed(caller.rights, known.holder)
                        await tool_credentials.delete(tx, tenant, known.id)
                        await audit.write(tx, tenant, entry)
        return small_reply(Deleted(credential_id, "tool_credential.deleted"))


def _check_name(name: str) -> None:
    if has_controls(name):
        raise InvalidParameter("Invalid value for 'name': control characters are not possible.", param="name")


def _sealed(services: Services, tenant: str, known: ToolCredential, secret: Secret | None) -> Sealed | None:
    """The new secret of a credential. Raises InvalidParameter if its server does not take it."""
    if secret is None:
        return None
    if not known.is_of_url:
        check_label(known.server, services.catalog, secret)
    sealed = seal_secret(services.seal.of(tenant), known.server, known.holder, secret)
    return Sealed(sealed, bool(secret.authorization), sorted(secret.headers))


def _viewer(caller: Caller) -> Viewer:
    rights = caller.rights
    return Viewer(rights.tenant, rights.user, own_key_of(rights), manages_all(rights))


def _shown(credential: ToolCredential) -> wire.ToolCredential:
    return wire.ToolCredential(
        id=credential.id,
        name=credential.name,
        server_url=credential.server if credential.is_of_url else None,
        server_label=None if credential.is_of_url else credential.server,
        user=credential.holder.user or None,
        key_id=credential.holder.key_id or None,
        has_authorization=credential.has_authorization,
        header_names=credential.header_names,
        created_at=credential.created_at,
        updated_at=credential.updated_at,
    )
