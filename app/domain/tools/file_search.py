"""`file_search`."""

from msgspec.structs import replace

from app.domain.hosted import HostedRoute
from app.domain.tools.answers import Answer
from app.domain.tools.search import Search
from app.domain.tools.server_tool import function
from app.ids import NewId
from app.wire.decoding import Json
from app.wire.items import FileSearchCall


class FileSearch(Search[FileSearchCall]):
    kind = "file_search"
    types = ("file_search",)
    function = function(
        "file_search",
        "Search the user's files. Cite what you use by its file name, as in 【name.pdf】.",
        queries={
            "type": "array",
            "items": {"type": "string"},
            "description": "What to search for, in several wordings.",
        },
    )
    item_type = "file_search_call"
    id_prefix = "fs"
    result_keys = {
        "file_id": ("file_id", "id", "document_id"),
        "filename": ("filename", "file_name", "name", "title", "path"),
        "score": ("score", "similarity", "rank"),
        "text": ("text", "content", "snippet", "chunk"),
        "attributes": ("attributes", "metadata"),
    }

    def values(self, given: Json) -> Json:
        queries = queries_of(given)
        return {"query": " ".join(queries), "queries": queries}

    def item(self, new_id: NewId, given: Json, arguments: str, container: str) -> FileSearchCall:
        return FileSearchCall(id=new_id(self.id_prefix), status="in_progress", queries=queries_of(given))

    def done(self, item: FileSearchCall, answer: Answer, route: HostedRoute | None) -> FileSearchCall:
        return replace(item, results=self.results(answer, route), status=answer.status)

    def given(self, item: FileSearchCall) -> Json | None:
        return {"queries": item.queries} if item.results is not None else None


def queries_of(given: Json) -> list[str]:
    """The queries that the model gave; models give one string where a list is asked for."""
    queries = given.get("queries", given.get("query"))
    return [str(query) for query in queries] if isinstance(queries, list) else [str(queries)] if queries else []
