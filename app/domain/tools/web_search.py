"""`web_search`."""

from msgspec.structs import replace

from app.domain.hosted import HostedRoute
from app.domain.tools.answers import Answer
from app.domain.tools.search import Search
from app.domain.tools.server_tool import function
from app.ids import NewId
from app.wire.decoding import Json
from app.wire.items import WebSearchCall


class WebSearch(Search[WebSearchCall]):
    kind = "web_search"
    types = (
        "web_search",
        "web_search_2025_08_26",
        "web_search_preview",
        "web_search_preview_2025_03_11",
    )
    function = function(
        "web_search",
        "Search the web. Cite what you use as a Markdown link: [title](url).",
        query={"type": "string", "description": "What to search for."},
    )
    item_type = "web_search_call"
    id_prefix = "ws"
    result_keys = {
        "url": ("url", "link", "href"),
        "title": ("title", "name"),
        "text": ("text", "snippet", "content", "description", "body"),
    }

    def values(self, given: Json) -> Json:
        return {**super().values(given), "queries": [given.get("query")]}

    def item(self, new_id: NewId, given: Json, arguments: str, container: str) -> WebSearchCall:
        query = str(given.get("query", ""))
        return WebSearchCall(
            id=new_id(self.id_prefix),
            status="in_progress",
            action={"type": "search", "query": query, "queries": [query]},
        )

    def done(self, item: WebSearchCall, answer: Answer, route: HostedRoute | None) -> WebSearchCall:
        results = self.results(answer, route)
        sources = [{"type": "url", "url": result["url"]} for result in results if "url" in result]
        return replace(item, action={**(item.action or {}), "sources": sources}, results=results, status=answer.status)

    def given(self, item: WebSearchCall) -> Json | None:
        return {"query": (item.action or {}).get("query", "")} if isinstance(item.results, list) else None
