"""`/v1/usage`: what the runs of the caller's tenant have used."""

from datetime import date
from typing import Any
from urllib.parse import urlencode

from litestar import Controller, Request, Response, get

from app.api import pages, queries
from app.api.replies import json_reply, reply
from app.api.services import Services
from app.domain.rights import Rights
from app.domain.usage_report import as_csv, place_of
from app.errors import InvalidParameter
from app.runs.admission import Caller
from app.storage import usage
from app.storage.database import storable
from app.storage.pages import Page
from app.storage.usage import Filter, Used
from app.wire.resources import encode


class UsageController(Controller):
    """Usage by day, model, key and user."""

    path = "/v1/usage"
    opt = {"or_admin": True}

    @get(opt=queries.TAKEN)
    async def report(self, request: Request[Any, Any, Any], caller: Caller, services: Services) -> Response[Any]:
        """What was used, of all that the caller may see."""
        query = queries.parse(request, queries.UsagePage)
        page = await _page(services, caller.rights, query)
        shown = [one.shown(query.group_by) for one in page.rows]
        if query.format == "csv":
            body = as_csv(shown).encode()
            headers = {"link": f'<{_next(request, shown[-1].id)}>; rel="next"'} if page.has_more else {}
            return reply(body, services.backlogs, headers, media_type="text/csv; charset=utf-8; header=present")
        return json_reply(
            pages.encoded([(one.id, encode(one)) for one in shown], has_more=page.has_more), services.backlogs
        )


async def _page(services: Services, rights: Rights, query: queries.UsagePage) -> Page[Used]:
    after = None
    if query.after is not None:
        after = place_of(query.after)
        if after is None or not all(map(storable, after)):
            raise InvalidParameter("'after' is no cursor of a page of usage.", param="after")
    if query.since and query.until and query.until < query.since:
        raise InvalidParameter("Invalid value for 'until': it is before 'since'.", param="until")
    key_id, user = rights.usage_seen
    if _is_other(query.key_id, key_id) or _is_other(query.user, user):
        return Page([], has_more=False)  # what it may not see is as what is not there
    filter = Filter(
        first_day=query.since or date.min,
        last_day=query.until or date.max,
        model=query.model,
        key_id=query.key_id if key_id is None else key_id,
        user=query.user if user is None else user,
    )
    async with services.database.autocommit() as tx:
        return await usage.report(
            tx, rights.tenant, filter, query.group_by, after=after, limit=query.limit, order=query.order
        )


def _is_other(asked: str | None, seen: str | None) -> bool:
    return None not in {asked, seen} and asked != seen


def _next(request: Request[Any, Any, Any], after: str) -> str:
    """The path of the next page."""
    given = [(name, value) for name, value in request.query_params.multi_items() if name != "after"]
    return f"{request.scope['path']}?{urlencode([*given, ('after', after)])}"
