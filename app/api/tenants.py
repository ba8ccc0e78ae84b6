"""`/v1/admin/tenants`: the tenants of the server, for its operators. Nothing deletes a tenant."""

from typing import Any

from litestar import Controller, Request, Response, get, post

from app.api import pages, queries
from app.api.admin import made_key
from app.api.replies import small_reply
from app.api.services import Services
from app.errors import InvalidParameter, NotFound
from app.runs.admission import Caller
from app.storage import audit, tenants
from app.storage.tenants import Tenant
from app.wire import admin as wire


class TenantsController(Controller):
    """Every tenant, whichever the caller's key belongs to."""

    path = "/v1/admin/tenants"
    opt = {"scope": "operator"}

    @post(status_code=200)
    async def create(self, request: Request[Any, Any, Any], caller: Caller, services: Services) -> Response[bytes]:
        """A new tenant. It has no keys yet."""
        asked = await services.bodies.decoded(request, wire.CREATE_TENANT)
        if "/" in asked.id or asked.id in {".", ".."}:
            raise InvalidParameter(
                "Invalid value for 'id': it may not contain '/', or be '.' or '..', since it is a part of URLs.",
                param="id",
            )
        entry = audit.entry(caller.rights, "tenant.created", asked.id, as_operator=True)
        async for attempt in services.database.settling():
            with attempt:
                async with services.database.begin() as tx:
                    made = await tenants.create_tenant(tx, asked.id, asked.limits, entry)
        return small_reply(_shown(made))

    @get(opt=queries.TAKEN)
    async def list(self, request: Request[Any, Any, Any], caller: Caller, services: Services) -> Response[Any]:
        """Tenants by creation."""
        query = queries.parse(request, queries.TenantPage)
        return await pages.resources(services, query, tenants.list_tenants, show=_shown)

    @get("/{tenant_id:str}")
    async def retrieve(self, tenant_id: str, caller: Caller, services: Services) -> Response[bytes]:
        """One tenant."""
        async with services.database.autocommit() as tx:
            return small_reply(_shown(await tenants.get_tenant(tx, tenant_id)))

    @post("/{tenant_id:str}", status_code=200)
    async def update(
        self, request: Request[Any, Any, Any], tenant_id: str, caller: Caller, services: Services
    ) -> Response[bytes]:
        """Replace the limits of a tenant, which hold for all its keys and users together."""
        asked = await services.bodies.decoded(request, wire.UPDATE_TENANT)
        entry = audit.entry(caller.rights, "tenant.updated", tenant_id, as_operator=True)
        async for attempt in services.database.settling():
            with attempt:
                async with services.database.begin() as tx:
                    changed = await tenants.update_tenant(tx, tenant_id, asked.limits, entry)
        return small_reply(_shown(changed))

    @post("/{tenant_id:str}/keys", status_code=200)
    async def create_key(
        self, request: Request[Any, Any, Any], tenant_id: str, caller: Caller, services: Services
    ) -> Response[bytes]:
        """A new key of a tenant, such as that of its first administrator. Only this reply has its secret."""
        if b"%2f" in request.scope["raw_path"].lower():  # decoded, the name of one tenant is the path of another's keys
            raise NotFound(f"Invalid URL (POST {request.scope['path']})")
        asked = await services.bodies.decoded(request, wire.CREATE_KEY)
        async with services.database.autocommit() as tx:
            await tenants.get_tenant(tx, tenant_id)  # which stays: nothing deletes one
        return await made_key(services, caller, tenant_id, asked, as_operator=True)


def _shown(tenant: Tenant) -> wire.Tenant:
    return wire.Tenant(
        id=tenant.id,
        created_at=tenant.created_at,
        keys=tenant.keys,
        users=tenant.users,
        stored_bytes=tenant.stored_bytes,
        limits=tenant.limits,
    )
