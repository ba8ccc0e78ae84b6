"""`code_interpreter`."""

from msgspec.structs import replace

from app.domain.hosted import HostedRoute
from app.domain.tools.answers import Answer
from app.domain.tools.server_tool import Hosted, function, progress_of
from app.ids import NewId
from app.wire.decoding import Json
from app.wire.events import CodeDelta, CodeDone, Event, ItemAdded
from app.wire.items import CodeInterpreterCall


class CodeInterpreter(Hosted[CodeInterpreterCall]):
    kind = "code_interpreter"
    types = ("code_interpreter",)
    function = function(
        "code_interpreter",
        "Run Python code and get what it prints.",
        code={"type": "string", "description": "The whole program."},
    )
    item_type = "code_interpreter_call"
    id_prefix = "ci"
    streamed = "code"

    def parse(self, arguments: str) -> Json | None:
        """Bare code is taken as code."""
        given = super().parse(arguments)
        return {"code": arguments} if given is None else given

    def item(self, new_id: NewId, given: Json, arguments: str, container: str) -> CodeInterpreterCall:
        code = str(given.get("code", "" if given else arguments))
        return CodeInterpreterCall(id=new_id(self.id_prefix), status="in_progress", code=code, container_id=container)

    def open(self, item: CodeInterpreterCall, output_index: int) -> list[Event]:
        code = item.code or ""
        return [
            ItemAdded(output_index=output_index, item=replace(item, code="", outputs=[])),
            *progress_of(item, output_index, "in_progress"),
            CodeDelta(item_id=item.id, output_index=output_index, delta=code),
            CodeDone(item_id=item.id, output_index=output_index, code=code),
            *progress_of(item, output_index, "interpreting"),
        ]

    def done(self, item: CodeInterpreterCall, answer: Answer, route: HostedRoute | None) -> CodeInterpreterCall:
        logs = answer.text if answer.error is None else f"Error: {answer.error_message}"
        images = [{"type": "image", "url": url} for url in answer.image_urls]
        outputs = [*([{"type": "logs", "logs": logs}] if logs else []), *images]
        return replace(item, outputs=outputs, status=answer.status)

    def container(self, item: CodeInterpreterCall) -> str:
        return item.container_id

    def given(self, item: CodeInterpreterCall) -> Json | None:
        return {"code": item.code or ""} if item.outputs is not None else None

    def result(self, item: CodeInterpreterCall) -> str:
        return "\n".join(map(_output_text, item.outputs or ())) or "The program printed nothing."


def _output_text(output: Json) -> str:
    return str(output.get("logs", "")) if output.get("type") == "logs" else "[An image, shown to the user.]"
