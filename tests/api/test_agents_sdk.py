"""The OpenAI Agents SDK runs agents with hosted MCP tools against this server: approvals by callback and by its run state.

It is imported where it is used: that takes seconds, and every process of a test run imports this file.
"""

import pytest

from tests.upstream import answer, call, calling, finish, note, script

HISTORY = pytest.mark.parametrize("chained", [False, True], ids=["whole-history", "previous-response"])
STREAMED = pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])


@pytest.fixture
def name(request):
    """A server name that is this test's own."""
    return "".join(filter(str.isalnum, request.node.name))


@pytest.fixture
def agent(async_client, toolserver, name):
    """Makes an agent whose one MCP server is the scripted one."""
    from agents import Agent, HostedMCPTool, OpenAIResponsesModel, set_tracing_disabled

    set_tracing_disabled(True)

    def make(decide=None, tools=(), **config):
        given = {"type": "mcp", "server_label": "box", "server_url": toolserver.url("mcp", name, tools="echo,add")}
        hosted = HostedMCPTool(
            tool_config={**given, "require_approval": "always", **config}, on_approval_request=decide
        )
        model = OpenAIResponsesModel(model="m", openai_client=async_client)
        return Agent(name="Reckoner", instructions="Reckon.", tools=[hosted, *tools], model=model)

    return make


@pytest.fixture
def run(streamed, chained):
    """Runs an agent, streamed or not; what the SDK sends each time is the whole history, or only what is new."""
    from agents import RunConfig, Runner

    async def run(agent, input):
        options = {"run_config": RunConfig(tracing_disabled=True), "auto_previous_response_id": chained}
        if not streamed:
            return await Runner.run(agent, input, **options)
        result = Runner.run_streamed(agent, input, **options)
        types = [event.data.type async for event in result.stream_events() if event.type == "raw_response_event"]
        assert types[-1] == "response.completed"
        return result

    return run


@STREAMED
@HISTORY
async def test_a_callback_approves_calls_one_after_the_other(agent, run, toolserver, name):
    asked = []

    def decide(request):
        asked.append((request.data.server_label, request.data.name, request.data.arguments))
        return {"approve": True}

    first, second = calling("add", {"a": 1, "b": 2}), calling("echo", {"x": 1}, id="call_2")
    result = await run(agent(decide), script([note(name), *first], second, answer("It is 3.")))
    assert result.final_output == "It is 3."
    assert asked == [("box", "add", '{"a":1,"b":2}'), ("box", "echo", '{"x":1}')]
    assert [one.arguments for one in toolserver.calls(name)] == [{"a": 1, "b": 2}, {"x": 1}]
    assert all(session.closed.wait(5) for session in toolserver.sessions(name))


@STREAMED
@HISTORY
async def test_a_callback_refuses_and_the_model_reads_why(agent, run, upstream, toolserver, name):
    def decide(request):
        return {"approve": False, "reason": "too dear"}

    said = script([note(name), *calling("add", {"a": 1, "b": 2})], answer("As you like."))
    result = await run(agent(decide), said)
    assert result.final_output == "As you like."
    assert toolserver.calls(name) == []
    read = [one["content"] for one in upstream.asked(said)[-1].body["messages"] if one["role"] == "tool"]
    assert len(read) == 1
    assert "too dear" in read[0]


@STREAMED
@HISTORY
async def test_a_run_is_interrupted_and_goes_on_from_its_stored_state(agent, run, toolserver, name):
    from agents import RunState

    both = [call("add", {"a": 1, "b": 2}, id="a"), call("echo", {"x": 1}, index=1, id="b"), finish("tool_calls")]
    made = agent()
    result = await run(made, script([note(name), *both], answer("Done.")))
    assert [item.raw_item.name for item in result.interruptions] == ["add", "echo"]
    assert toolserver.calls(name) == []
    state = await RunState.from_json(made, result.to_state().to_json())
    add, echo = state.get_interruptions()
    state.approve(add)
    state.reject(echo)
    result = await run(made, state)
    assert result.final_output == "Done."
    assert [one.tool for one in toolserver.calls(name)] == ["add"]


@STREAMED
@HISTORY
async def test_a_function_of_the_client_in_the_same_turn(agent, run, upstream, toolserver, name):
    from agents import function_tool

    @function_tool
    def get_time() -> str:
        """What time it is."""
        return "noon"

    both = [call("add", {"a": 1, "b": 2}, id="a"), call("get_time", {}, index=1, id="b"), finish("tool_calls")]
    said = script([note(name), *both], answer("It is 3, at noon."))
    result = await run(agent(lambda request: {"approve": True}, tools=[get_time]), said)
    assert result.final_output == "It is 3, at noon."
    assert len(toolserver.calls(name)) == 1
    read = [one["content"] for one in upstream.asked(said)[-1].body["messages"] if one["role"] == "tool"]
    assert sorted(read) == ["3", "noon"]


@STREAMED
@HISTORY
async def test_without_approvals_one_response_does_it_all(agent, run, toolserver, name):
    said = script([note(name), *calling("add", {"a": 1, "b": 2})], answer("It is 3."))
    result = await run(agent(require_approval="never"), said)
    assert result.final_output == "It is 3."
    assert len(result.raw_responses) == 1
    assert len(toolserver.calls(name)) == 1


@STREAMED
async def test_its_session_is_a_conversation(agent, async_client, streamed):
    from agents import OpenAIConversationsSession, RunConfig, Runner

    session = OpenAIConversationsSession(openai_client=async_client)
    talker, off = agent(), RunConfig(tracing_disabled=True)
    await session.add_items([{"role": "user", "content": f"earlier {n}"} for n in range(25)])
    for said in ("one", "two"):
        if streamed:
            result = Runner.run_streamed(talker, said, session=session, run_config=off)
            async for _ in result.stream_events():
                pass
        else:
            result = await Runner.run(talker, said, session=session, run_config=off)
        assert result.final_output == f"ok: {said}"
    kept = [one for one in await session.get_items() if one["type"] == "message"]
    assert len(kept) == 25 + 4
    assert (await session.pop_item())["content"][0]["text"] == "ok: two"
    assert [one["content"][0]["text"] for one in await session.get_items(limit=2)] == ["ok: one", "two"]
    await session.clear_session()


@STREAMED
async def test_it_runs_in_a_conversation(agent, async_client, upstream, streamed, name):
    from agents import RunConfig, Runner

    made = await async_client.conversations.create(items=[{"role": "user", "content": "I am Ada."}])
    options = {"conversation_id": made.id, "run_config": RunConfig(tracing_disabled=True)}
    said = script([*calling("add", {"a": 1, "b": 2}), note(name)], answer("three"))
    approving = agent(lambda _: {"approve": True})
    if streamed:
        result = Runner.run_streamed(approving, said, **options)
        async for _ in result.stream_events():
            pass
    else:
        result = await Runner.run(approving, said, **options)
    assert result.final_output == "three"
    kinds = [item.type async for item in async_client.conversations.items.list(made.id, order="asc")]
    assert kinds[0] == "message" and kinds[-1] == "message"
    assert {"mcp_list_tools", "mcp_approval_request", "mcp_approval_response", "mcp_call"} <= set(kinds)
    assert len(kinds) == len(set(kinds)) + 2


SHOT = "aGk="
ASKED = {
    "shell": {"commands": ["ls", "pwd"]},
    "local_shell": {"command": ["ls"]},
    "apply_patch": {"type": "update_file", "path": "a.txt", "diff": "@@\n-a\n+b"},
    "computer": {"actions": [{"type": "click", "x": 1, "y": 2}, {"type": "screenshot"}]},
    "computer preview": {"action": {"type": "click", "x": 1, "y": 2}},
}


def tool_of_the_client(kind, ran):
    """A tool of the SDK that puts down in `ran` what it was asked for."""
    from agents import ApplyPatchTool, Computer, ComputerTool, LocalShellTool, ShellTool

    class Editor:
        def update_file(self, operation):
            ran.append((operation.type, operation.path, operation.diff))
            return "patched"

        create_file = delete_file = update_file

    class Screen(Computer):
        environment = "browser" if kind == "computer preview" else None
        dimensions = (800, 600) if kind == "computer preview" else None

        def screenshot(self):
            return SHOT

        def click(self, x, y, button):
            ran.append((x, y, button))

        double_click = scroll = type = wait = move = keypress = drag = click

    match kind:
        case "shell":
            return ShellTool(executor=lambda asked: ran.append(asked.data.action.commands) or "a.txt")
        case "local_shell":
            return LocalShellTool(executor=lambda asked: ran.append(asked.data.action.command) or "a.txt")
        case "apply_patch":
            return ApplyPatchTool(editor=Editor())
    return ComputerTool(computer=Screen())


@STREAMED
@HISTORY
@pytest.mark.parametrize("kind", ASKED)
async def test_its_tools_that_the_client_runs(async_client, run, upstream, name, kind):
    from agents import Agent, OpenAIResponsesModel, set_tracing_disabled

    set_tracing_disabled(True)
    ran = []
    model = "computer-use-preview" if kind == "computer preview" else "gpt-5.5"
    agent = Agent(
        name="Worker",
        tools=[tool_of_the_client(kind, ran)],
        model=OpenAIResponsesModel(model=model, openai_client=async_client),
    )
    id = f"call_{name}"[:64]
    asked = script([note(name), *calling(kind.partition(" ")[0], ASKED[kind], id=id)], answer("Done."))
    result = await run(agent, asked)
    assert ran == {
        "shell": [["ls", "pwd"]],
        "local_shell": [["ls"]],
        "apply_patch": [("update_file", "a.txt", "@@\n-a\n+b")],
    }.get(kind, [(1, 2, "left")])
    attached = f"Attachments of tool call {id}:"
    is_computer = kind.startswith("computer")
    assert result.final_output == (f"ok: {attached}" if is_computer else "Done.")
    last = upstream.asked(attached if is_computer else asked)[-1].body["messages"]
    read = str(last[-1]["content"])
    assert {"shell": "a.txt", "local_shell": "a.txt", "apply_patch": "completed: patched"}.get(kind, SHOT) in read
