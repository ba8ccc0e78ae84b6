"""python -m tests.tools_story: a scenario of tools that the server runs, with the official client.

Two MCP servers have a tool of the same name. In one turn the model calls both and a function: one call is made at once, the
other waits for approval, the function is the client's. Then the client sends its approval and the function's output, and
the model answers. All that three times: streamed, in the background, and in the background with kill -9 of the worker
between a call and its result, in both responses. The servers, the worker and the tool servers are processes that are started
here; the model is scripted. Exits with 1 at the first violation.
"""

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
from openai.types.responses import Response

from tests.faults.client import decoded, frames_of
from tests.faults.cluster import Cluster, Servers
from tests.faults.stream_oracle import checked_response
from tests.toolserver import Toolprocess
from tests.upstream import Upstream, answer, call, finish, note, script
from tests.waiting import until

UNKNOWN = "it may have been carried out."
"""Part of what the model reads of a call with an unknown outcome."""
GET_TIME = {"type": "function", "name": "get_time", "parameters": {"type": "object"}, "strict": False}


class Violation(Exception):
    """An expectation does not hold."""


def must(true: object, what: str) -> None:
    """Print an expectation that holds. Raises Violation if it does not."""
    if not true:
        raise Violation(what)
    print(f"    holds: {what}")


class Story:
    """The processes, and the scenario."""

    def __init__(self, cluster: Cluster, upstream: Upstream, north: Toolprocess, south: Toolprocess) -> None:
        self._cluster, self._upstream, self._north, self._south = cluster, upstream, north, south
        self._client = openai.OpenAI(base_url=cluster.urls[0], api_key="none", max_retries=0)

    def run(self, name: str, *, background: bool, kill: bool) -> None:
        """The scenario from the question to the answer. Raises Violation."""
        print(f"\n{name}")
        if not kill:
            self._north.open(name)
            self._south.open(name)
        said = self._question(name)
        tools = self._tools(name)
        waiting = [self._north, self._south] if kill else []
        first = self._made(name, waiting[:1], background=background, input=said, tools=tools)
        by_type = {item.type: item for item in first.output if item.type != "mcp_list_tools"}
        made, request, function = (by_type[type] for type in ("mcp_call", "mcp_approval_request", "function_call"))
        must(made.server_label == "north", "the call that needs no approval was made at the north server")
        must(request.server_label == "south", "the call that needs approval waits, and belongs to the south server")
        must(self._south.calls(name) == [], "the south server has not been called")
        approval = {"type": "mcp_approval_response", "approval_request_id": request.id, "approve": True}
        output = {"type": "function_call_output", "call_id": function.call_id, "output": "noon"}
        print("  the client approves, and answers get_time")
        more = {"input": [approval, output], "tools": tools, "previous_response_id": first.id}
        second = self._made(name, waiting[1:], background=background, **more)
        approved = next(item for item in second.output if item.type == "mcp_call")
        must(approved.approval_request_id == request.id, "the approved call names its request")
        must(second.output_text == "That is all.", "the model has had the last word")
        self._check_calls(name, [made, approved], unknown=kill)
        self._check_read(said, [made, approved], unknown=kill)
        try:
            self._client.responses.create(model="m", **more)
        except openai.BadRequestError as error:
            must("answered already" in error.message, "the approval can't be used again")
        else:
            raise Violation("the approval was used twice")

    def _question(self, name: str) -> str:
        """What the model shall do."""
        turn = [
            call("north__gate", {"name": name}, id="a"),
            call("south__gate", {"name": name}, index=1, id="b"),
            call("get_time", {}, index=2, id="c"),
            finish("tool_calls"),
        ]
        return script([note(name), *turn], answer("That is all."))

    def _tools(self, name: str) -> list[dict[str, Any]]:
        clashing = {"type": "mcp", "allowed_tools": ["gate"]}
        return [
            {**clashing, "server_label": "north", "server_url": self._north.url(name), "require_approval": "never"},
            {**clashing, "server_label": "south", "server_url": self._south.url(name), "require_approval": "always"},
            GET_TIME,
        ]

    def _made(self, name: str, waiting: list[Toolprocess], *, background: bool, **request: Any) -> Response:
        """A response, streamed to its end; its worker is killed while it waits for a call's result, if a server is `waiting`."""
        events = []
        create: Callable[..., Any] = self._client.responses.create
        stream = create(model="m", stream=True, background=background, **request)
        for event in stream:
            events.append(event)
            if event.type == "response.output_item.done":
                print(f"  {event.sequence_number:>3}  {_line(event.item)}")
            if event.type == "response.mcp_call.in_progress" and waiting:
                waiting.pop().wait_calls(name)
                self._cluster.kill_workers()
                print("       the call has come to its server. kill -9 of the worker")
                self._cluster.start_worker()
        response = events[-1].response
        self._check_events(response, [event.to_dict(mode="json") for event in events], background=background)
        return response

    def _check_events(self, response: Response, seen: list[dict[str, Any]], *, background: bool) -> None:
        """All replicas and clients agree. Raises Violation or AssertionError."""
        assert (
            checked_response(seen)
            == seen[-1]["response"]
            == self._client.responses.retrieve(response.id).to_dict(mode="json")
        )
        must(
            response.status == "completed",
            "the response is completed; its events are gapless and fold into what GET gives",
        )
        if background:
            assert [decoded(frame) for frame in frames_of(self._cluster.urls[1], response.id)] == seen
            with self._client.responses.stream(response_id=response.id) as accumulated:
                assert accumulated.get_final_response().id == response.id
            must(True, "another replica replays the same events, and the official client puts them together")

    def _check_calls(self, name: str, calls: list[Any], *, unknown: bool) -> None:
        for item, server in zip(calls, (self._north, self._south), strict=True):
            sent = server.calls(name)
            must(
                [one["meta"]["reprise/idempotencyKey"] for one in sent] == [item.id],
                f"{item.server_label} was called once",
            )
            if unknown:
                must(
                    UNKNOWN in item.error.message and item.output is None,
                    "its outcome is unknown: the call has failed",
                )
            else:
                must((item.status, item.output) == ("completed", "through"), "its result is in the item")

    def _check_read(self, said: str, calls: list[Any], *, unknown: bool) -> None:
        messages = self._upstream.asked(said)[-1].body["messages"]
        read = sorted(message["content"] for message in messages if message["role"] == "tool")
        expected = [f"Error: {item.error.message}" if unknown else str(item.output) for item in calls]
        must(read == sorted([*expected, "noon"]), f"the model has read {json.dumps(read)}")


def _line(item: Any) -> str:
    match item.type:
        case "mcp_list_tools":
            return f"{item.server_label} has {[tool.name for tool in item.tools]}"
        case "mcp_call":
            outcome = item.output if item.error is None else f"{item.status}: {item.error.message}"
            return f"{item.server_label}.{item.name}({item.arguments}) -> {outcome}"
        case "mcp_approval_request":
            return f"{item.server_label}.{item.name}({item.arguments}) waits for approval"
        case "function_call":
            return f"{item.name}({item.arguments}) is handed over to the client"
        case "message":
            return f"the model says: {item.content[0].text}"
    return str(item.type)


def end(servers: Servers) -> None:
    """Stop Postgres and Valkey, and wait: their files must not go before them."""
    pids = [servers.postgres()[0], *servers.valkey()]
    servers.close()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "Postgres and Valkey have stopped")


@contextlib.contextmanager
def cast(home: Path) -> Iterator[Story]:
    """Start everything; end it in the end."""
    with contextlib.ExitStack() as ending:
        upstream = ending.enter_context(Upstream())
        north, south = (ending.enter_context(Toolprocess(home / name)) for name in ("north", "south"))
        servers = Servers(home / "servers")
        ending.callback(end, servers)
        env = {
            "OPENAI_BASE_URL": upstream.base_url,
            "REPRISE_DATA_DIR": str(home / "data"),
            "REPRISE_OUTBOUND_ALLOW": "127.0.0.1/32",
        }
        cluster = Cluster(servers, env)
        ending.callback(cluster.close)
        cluster.ensure(replicas=2, workers=1)
        print(f"Reprise: {' and '.join(cluster.urls)}, and a worker; tool servers: {north.url()} and {south.url()}")
        yield Story(cluster, upstream, north, south)
        print("\nwhat is left")
        for one in north, south:
            until(lambda one=one: one.open_sessions("streamed") == one.open_sessions("background") == 0, "sessions end")
        must(True, "the tool servers have no session open but those that the killed workers held")
        cluster.assert_nothing_is_left()
        must(True, "no run, no sealed secret, no journal is left")


def main() -> int:
    """Run the scenarios; 1 after a violation."""
    with tempfile.TemporaryDirectory(prefix="tools-story-") as home:
        try:
            with cast(Path(home)) as story:
                story.run("streamed", background=False, kill=False)
                story.run("background", background=True, kill=False)
                story.run("killed", background=True, kill=True)
        except (Violation, AssertionError) as error:
            print(f"VIOLATED: {error}")
            return 1
    print("\nAll of it held.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
