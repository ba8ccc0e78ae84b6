"""The two tool servers that come with it, behind hosted tools, as docs/tools.md sets them up."""

import subprocess
import sys

import pytest

from tests.servers import ROOT, Served
from tests.upstream import answer, calling, script

CATALOG = """
[upstreams.up]
base_url = "{upstream}"

[tool_servers.sandbox]
command = ["{python}", "-m", "app.toolservers.sandbox"]
shared = "all"
environment = {{ PYTHONPATH = "{root}" }}

[tool_servers.files]
command = ["{python}", "-m", "app.toolservers.files"]
shared = "all"
environment = {{ PYTHONPATH = "{root}", DATABASE_URL = "{database}" }}

[hosted.code_interpreter]
server = "sandbox"
tool = "run_python"
arguments = {{ code = "$code", container = "$container" }}

[hosted.file_search]
server = "files"
tool = "search_files"
arguments = {{ queries = "$queries", stores = "$vector_store_ids", tenant = "$tenant", max_results = "$max_num_results", filters = "$filters" }}
"""


@pytest.fixture(scope="module")
def database(new_database):
    """Where responses and files are."""
    return new_database()


@pytest.fixture(scope="module")
def reference_client(base_env, database, upstream, tmp_path_factory):
    """The official client of a server with the reference tool servers."""
    catalog = tmp_path_factory.mktemp("catalog") / "catalog.toml"
    catalog.write_text(CATALOG.format(upstream=upstream.base_url, python=sys.executable, root=ROOT, database=database))
    env = {name: value for name, value in base_env.items() if name != "OPENAI_BASE_URL"}
    with (
        Served({**env, "DATABASE_URL": database, "REPRISE_CATALOG": str(catalog)}) as running,
        running.client() as made,
    ):
        yield made


def test_code_runs_in_the_sandbox_and_finds_its_files_again(reference_client, upstream):
    tools = [{"type": "code_interpreter", "container": {"type": "auto"}}]
    asking = {"model": "m", "tools": tools, "include": ["code_interpreter_call.outputs"]}
    write = script(calling("code_interpreter", {"code": "open('n', 'w').write('41')\nprint(6 * 7)"}), answer("42."))
    first = reference_client.responses.create(input=write, **asking)
    assert [(one.type, one.logs.split("\n")[0]) for one in first.output[0].outputs] == [("logs", "42")]
    read = script(calling("code_interpreter", {"code": "print(int(open('n').read()) + 1)"}), answer("42 again."))
    then = reference_client.responses.create(input=read, previous_response_id=first.id, **asking)
    assert then.output[0].outputs[0].logs.startswith("42")
    assert then.output[0].container_id == first.output[0].container_id
    assert upstream.asked(read)[1].body["messages"][-1]["content"].startswith("42")


def test_files_are_found_and_cited(reference_client, database, tmp_path):
    plan = tmp_path / "plan.md"
    plan.write_text("# The plan\n\nThe fjord ferry sails at nine.\n")
    put = [sys.executable, "-m", "app.toolservers.files", "--database", database, "add"]
    subprocess.run([*put, "--tenant", "default", "--store", "vs_trips", str(plan)], cwd=ROOT, check=True)
    given = script(calling("file_search", {"queries": ["fjord ferry"]}), answer("At nine, says 【plan.md】."))
    asking = {"model": "m", "input": given, "include": ["file_search_call.results"]}
    made = reference_client.responses.create(
        tools=[{"type": "file_search", "vector_store_ids": ["vs_trips"], "max_num_results": 3}], **asking
    )
    (found,) = made.output[0].results
    assert (found.filename, "sails at nine" in found.text) == ("plan.md", True)
    (cited,) = made.output[1].content[0].annotations
    assert (cited.type, cited.filename, cited.file_id) == ("file_citation", "plan.md", found.file_id)
    nothing = reference_client.responses.create(
        tools=[{"type": "file_search", "vector_store_ids": ["vs_others"]}], **asking
    )
    assert nothing.output[0].results == []
