"""docs/clients.md shows what `reprise connect` prints; `make clients` runs it."""

import tomllib
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from app.cli import reprise
from app.clients import CLIENTS

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "clients.md").read_text()


@pytest.mark.parametrize("name", CLIENTS)
def test_the_page_shows_the_lines_of_every_client(name):
    client = CLIENTS[name]
    section = PAGE[PAGE.index(f"\n## {client.name}\n") :].split("\n## ")[1]
    assert f"\n{client.lines('http://127.0.0.1:8000/v1', 'echo', 'none')}\n```" in section
    assert f"`{client.file}` (`reprise connect {name}`), then `{client.command('none')}`:" in section


def test_the_page_shows_no_other_client():
    assert PAGE.count("(`reprise connect ") == len(CLIENTS)


@pytest.mark.parametrize("name", CLIENTS)
def test_the_lines_are_those_for_a_server_a_model_and_a_key(name):
    done = CliRunner().invoke(
        reprise, ["connect", name, "--url", "http://host:1/v1", "--model", "m-1", "--key", "rp_1"]
    )
    assert done.exit_code == 0
    assert "http://host:1/v1" in done.stdout and "m-1" in done.stdout and "$" not in done.stdout
    assert "rp_1" in done.output


def test_without_a_url_it_is_that_of_serve(monkeypatch):
    monkeypatch.setenv("REPRISE_PORT", "8123")
    assert 'base_url = "http://127.0.0.1:8123/v1"' in CliRunner().invoke(reprise, ["connect", "codex"]).stdout


def test_files_are_of_their_format():
    tomllib.loads(CLIENTS["codex"].lines("u", "m", "k"))
    msgspec.json.decode(CLIENTS["opencode"].lines("u", "m", "k"))


def test_the_image_leaves_files_out_that_there_are():
    left_out = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("app/")]
    assert left_out
    assert [path for path in left_out if not (ROOT / path).is_file()] == []
