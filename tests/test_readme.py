"""README and docs tell the truth: snippets run, settings are the settings, links lead somewhere, what is refused is refused."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import httpx
import msgspec
import pytest

from app.domain.dialect import Dialect
from app.domain.rights import Rights
from app.outbound.catalog_file import load_catalog
from app.settings import Settings, load, variable
from app.wire.requests import PromptParameters
from tests.servers import ROOT, Served

README = ROOT / "README.md"
DOCS = ROOT / "docs"
DEFAULT_URL = "http://127.0.0.1:8000/v1"


def snippets(language: str, page: Path = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def settings_table() -> str:
    """The table of docs/settings.md, made from the Struct."""
    lines = ["| variable | default | meaning |", "|---|---|---|"]
    for field in msgspec.structs.fields(Settings):
        default = "" if field.default == "" else f"`{_plainly(field.default)}`"
        meaning = msgspec.inspect.type_info(field.type)
        description = (getattr(meaning, "extra_json_schema", None) or {}).get("description", "")
        lines.append(f"| `{variable(field.name)}` | {default} | {description} |")
    return "\n".join(lines)


def _plainly(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A server with nothing configured but its port and data: embedded servers, the demo upstream."""
    data = tmp_path_factory.mktemp("demo")
    with Served({"REPRISE_DATA_DIR": str(data)}) as running:
        yield running


@pytest.mark.parametrize("code", snippets("python"))
def test_every_python_snippet_runs_against_a_server_with_nothing_configured(demo, code, capsys):
    exec(compile(code.replace(DEFAULT_URL, demo.url), str(README), "exec"), {})
    assert "Ada" in capsys.readouterr().out


def test_the_curl_line_gets_an_answer(demo):
    (line,) = [line for block in snippets("sh") for line in block.splitlines() if line.startswith("curl")]
    command = shlex.split(line.replace(DEFAULT_URL, demo.url))
    answer = subprocess.run([*command, "--silent", "--fail"], capture_output=True, check=True)
    assert msgspec.json.decode(answer.stdout)["status"] == "completed"


def test_the_key_commands_work_as_they_stand(base_env, new_database):
    env = {**os.environ, **base_env, "DATABASE_URL": new_database()}
    (block,) = [block for block in snippets("sh") if "reprise keys create" in block]
    key_id = ""
    for line in block.splitlines():
        words = shlex.split(line.replace("KEY_ID", key_id), comments=True)
        done = subprocess.run(
            ["python", "-m", "app", *words[1:]],
            cwd=ROOT,
            env=_with_venv(env),
            capture_output=True,
            text=True,
            check=True,
        )
        key_id = key_id or done.stderr.split()[0]
        if words[2] == "list":
            assert key_id in done.stdout


def _with_venv(env: dict[str, str]) -> dict[str, str]:
    import sys

    return {**env, "PATH": f"{Path(sys.executable).parent}:{env['PATH']}"}


def test_the_catalog_is_a_valid_one(catalog_file):
    [toml, summaries, prices, prompts], [tools] = (
        snippets("toml", DOCS / "catalog.md"),
        snippets("toml", DOCS / "tools.md"),
    )
    load_catalog(load({"REPRISE_CATALOG": catalog_file(toml.split("[[models]]")[0] + summaries)}), {"SPARE_KEY": "k"})
    priced = load(
        {
            "REPRISE_CATALOG": catalog_file(
                prices.partition("\n")[0] + "\n" + toml.split("[[models]]")[0] + prices.partition("\n")[2]
            )
        }
    )
    routes = load_catalog(priced, {"SPARE_KEY": "k"}).routes("qwen3-32b")
    assert [route.prices and str(route.prices.input) for route in routes] == ["0.1", "0.2"]
    settings = load({"REPRISE_CATALOG": catalog_file(toml + prompts)})
    catalog = load_catalog(settings, {"SPARE_KEY": "k"})
    assert [route.model for route in catalog.routes("qwen3-32b")] == ["qwen3-32b", "qwen3-8b"]
    assert catalog.routes("spare@llama-3")[0].upstream == "spare"
    assert catalog.upstreams["local"].speaks == Dialect(reasoning="reasoning_content", lacks=frozenset({"json_object"}))
    assert catalog.prompts["greeting"].default_version == "1"
    served = load_catalog(load({"REPRISE_CATALOG": catalog_file(tools)}), {})
    assert {kind: route.server for kind, route in served.hosted.items()} == {
        "web_search": "search",
        "code_interpreter": "sandbox",
        "file_search": "files",
    }
    assert set(served.tool_servers) == {"search", "sandbox", "files"}


def test_the_agent_is_a_valid_one_whose_page_names_all_its_keys(catalog_file):
    [agent] = snippets("toml", DOCS / "agents.md")
    more = '[upstreams.a]\nbase_url = "http://x/v1"\n[tool_servers.people]\nurl = "http://x"\n'
    catalog = load_catalog(load({"REPRISE_CATALOG": catalog_file(more + agent)}), {})
    made = catalog.agents["greeter"]
    assert (made.overrides, made.users, made.admits(Rights("acme", "ada"))) == (
        ["temperature", "max_output_tokens"],
        ["ada"],
        True,
    )
    table = (DOCS / "agents.md").read_text().split("| key | meaning |")[1].split("\n\n")[0]
    own = set(type(made).__struct_fields__) - set(PromptParameters.__struct_fields__) | {"model", "tools"}
    assert own <= set(re.findall(r"`(\w+)`", table))


def test_the_issuers_are_valid_ones(catalog_file):
    [issuers] = snippets("toml", DOCS / "rights.md")
    path = catalog_file(f'[upstreams.a]\nbase_url = "http://x/v1"\n{issuers}')
    catalog = load_catalog(load({"REPRISE_CATALOG": path}), {})
    assert catalog.issuers.keys() == {"company", "staff"}
    entry = catalog.issuers["company"]
    named = set(re.findall(r"`(\w+)`", (DOCS / "rights.md").read_text().split("## Tokens")[1].split("\nA claim")[0]))
    assert set(entry.__struct_fields__) - named - {"secret", "claims"} == set()


def test_the_settings_table_is_that_of_the_code():
    text = (DOCS / "settings.md").read_text()
    block = re.search(r"<!-- settings:.*?-->\n(.*?)\n?<!-- /settings -->", text, re.DOTALL)
    assert block
    assert block[1] == settings_table(), f"the table should be:\n{settings_table()}"


@pytest.mark.parametrize("page", [README, *sorted(DOCS.glob("*.md"))], ids=lambda page: page.name)
def test_every_link_leads_to_a_file(page):
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_readme_is_short_and_leads_to_every_page():
    text = README.read_text()
    assert len(text.splitlines()) < 150
    assert [page.name for page in DOCS.glob("*.md") if f"(docs/{page.name})" not in text] == []


def test_each_promise_has_its_tests():
    text = README.read_text()
    promises = re.split(r"(?m)^\d+\. ", text[text.index("## What it promises") : text.index("Not offered")])[1:]
    assert len(promises) > 10
    assert all(re.search(r"\]\(tests/[\w/]+\.py\)", promise) for promise in promises)


def test_endpoints_that_are_not_offered_are_not_found(demo):
    [listed] = re.findall(r"These answer 404: (.*?)\.", (DOCS / "api.md").read_text())
    paths = re.findall(r"`(/[\w/]+)`", listed)
    assert len(paths) > 5
    root = demo.url.removesuffix("/v1")
    answers = {path: httpx.post(f"{root}/v1{path}", json={}).status_code for path in paths}
    assert answers == dict.fromkeys(paths, 404)
