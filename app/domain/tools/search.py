"""What the searches have in common: their results, from whatever a tool gives."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from app.domain.hosted import HostedRoute
from app.domain.tools.answers import Answer
from app.domain.tools.server_tool import Hosted
from app.wire.decoding import Json
from app.wire.items import FileSearchCall, WebSearchCall

S = TypeVar("S", bound=WebSearchCall | FileSearchCall)


class Search(Hosted[S]):
    stages = ("in_progress", "searching")
    result_keys: Mapping[str, Sequence[str]]
    """Key → the names that tools give it."""

    def results(self, answer: Answer, route: HostedRoute | None) -> list[Json]:
        """The results of a structured answer, or of a text that is JSON; else the text is the one result."""
        if answer.error is not None or route is None:
            return [{"text": f"Error: {answer.error_message}"}]
        found = _listed(route.find(answer), route.results)
        if found is None:
            return [{"text": answer.text}] if answer.text else []
        return [_renamed(result, self.result_keys, route.fields) for result in found]

    def result(self, item: S) -> str:
        return "\n\n".join(map(_result_text, item.results or ())) or "Nothing was found."


def _listed(found: Any, path: str) -> list[Json] | None:
    """The list of objects that was found; without a path the first list of an object."""
    if isinstance(found, dict) and not path:
        found = next((value for value in found.values() if isinstance(value, list)), None)
    if not isinstance(found, list):
        return None
    return [one if isinstance(one, dict) else {"text": str(one)} for one in found]


def _renamed(result: Json, names: Mapping[str, Sequence[str]], fields: Mapping[str, str]) -> Json:
    made = {}
    for name, others in names.items():
        keys = [fields[name]] if name in fields else others
        value = next((result[key] for key in keys if result.get(key) is not None), None)
        if value is not None:
            made[name] = value
    return made


def _result_text(result: Json) -> str:
    name = result.get("title") or result.get("filename")
    lines = [f"【{name}】" if "filename" in result else name, result.get("url"), result.get("text")]
    return "\n".join(str(line) for line in lines if line)
