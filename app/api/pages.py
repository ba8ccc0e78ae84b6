"""Pages of lists as clients get them."""

from collections.abc import Awaitable, Callable, Collection, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

import msgspec
from litestar import Response

from app.api import queries
from app.api.replies import json_reply
from app.api.services import Services
from app.errors import InvalidParameter
from app.offload import offload
from app.rooms import Room
from app.storage.contexts import ItemPage, StoredItem
from app.storage.database import Tx
from app.storage.pages import Page
from app.storage.responses import Filter, Stored, list_responses
from app.wire import resources as wire
from app.wire.items import OpaqueItem, decode_stored_item, encode_item
from app.wire.redaction import Redaction
from app.wire.requests import Order
from app.wire.resources import encode

T = TypeVar("T")

OPPOSITE: dict[Order, Order] = {"asc": "desc", "desc": "asc"}


class Identified(Protocol):
    """A resource with an id."""

    @property
    def id(self) -> str:
        """Its id."""


class Query(Protocol):
    """The page that a client asks for."""

    @property
    def after(self) -> str | None:
        """The id of the last row of the page before."""

    @property
    def limit(self) -> int:
        """Rows on the page, at most."""

    @property
    def order(self) -> Order:
        """By creation."""


ListItems = Callable[[Tx, str, str, ItemPage, int], Awaitable[tuple[int, Page[StoredItem] | None]]]
"""Reads a page of the items of a tenant's response or conversation, if it takes at most so many bytes."""


async def read(
    services: Services, read: Callable[[int], Awaitable[tuple[int, T | None]]], write: Callable[[T], bytes]
) -> Response[Any]:
    """A reply with what is stored, once there is room for it."""
    with Room(services.reads) as room:
        found = await room.read(read, wait_s=services.settings.context_wait_s)
        body = await offload(room.size, write, found)
    return json_reply(body, services.backlogs)


async def responses(
    services: Services,
    query: Query,
    filter: Filter,
    tenant_id: str,
    *,
    after: str | None,
    write: Callable[[Page[tuple[str, Stored]]], bytes],
) -> Response[Any]:
    """A reply with a page of responses after this id, as `write` makes it. Raises InvalidParameter for the cursor."""

    async def read_page(bytes_max: int) -> tuple[int, Page[tuple[str, Stored]] | None]:
        async with services.database.autocommit() as tx:
            return await list_responses(
                tx,
                tenant_id,
                filter,
                after=after,
                limit=query.limit,
                order=query.order,
                page_bytes=services.settings.page_bytes_max,
                bytes_max=bytes_max,
            )

    return await read(services, read_page, write)


async def items(
    services: Services, query: queries.ItemPage, list_items: ListItems, tenant_id: str, id: str
) -> Response[Any]:
    """A reply with a page of items. Raises InvalidParameter for two cursors."""
    if query.before is not None and query.after is not None:
        raise InvalidParameter("Give 'after' or 'before', not both.", param="before")
    backwards = query.before is not None
    page = ItemPage(
        after=query.before if backwards else query.after,
        limit=query.limit,
        order=OPPOSITE[query.order] if backwards else query.order,
        page_bytes=services.settings.page_bytes_max,
        param="before" if backwards else "after",
    )

    async def read_page(bytes_max: int) -> tuple[int, Page[StoredItem] | None]:
        async with services.database.autocommit() as tx:
            return await list_items(tx, tenant_id, id, page, bytes_max)

    return await read(services, read_page, partial(_page_of_items, include=query.include, backwards=backwards))


def _page_of_items(page: Page[StoredItem], include: Collection[str], *, backwards: bool) -> bytes:
    """They come the other way round, if they were read `backwards` from a cursor."""
    rows = [(item.id, shown(item.body.encode(), include)) for item in page.rows]
    return encoded(rows[::-1] if backwards else rows, has_more=page.has_more)


def shown(body: bytes, include: Collection[str]) -> bytes:
    """A stored item as it is listed."""
    return Redaction(include).item(_listed(body))


def encoded(rows: Sequence[tuple[str, bytes]], *, has_more: bool) -> bytes:
    """A page of rows (id, JSON) as JSON."""
    return encode(
        wire.Page(
            data=[msgspec.Raw(body) for _, body in rows],
            first_id=rows[0][0] if rows else None,
            last_id=rows[-1][0] if rows else None,
            has_more=has_more,
        )
    )


async def resources(
    services: Services,
    query: Query,
    list_rows: Callable[..., Awaitable[Page[T]]],
    *of: object,
    show: Callable[[T], Identified],
) -> Response[Any]:
    """A reply with a page of rows `of` a tenant, as `show` makes them. Raises InvalidParameter for the cursor."""
    async with services.database.autocommit() as tx:
        page = await list_rows(tx, *of, after=query.after, limit=query.limit, order=query.order)
    made = [show(row) for row in page.rows]
    return json_reply(encoded([(one.id, encode(one)) for one in made], has_more=page.has_more), services.backlogs)


def _listed(body: bytes) -> bytes:
    """Items carry a status wherever they are listed."""
    item = decode_stored_item(body)
    if not isinstance(item, OpaqueItem) and getattr(item, "status", "") is msgspec.UNSET:
        return encode_item(msgspec.structs.replace(item, status="completed"))
    return body
