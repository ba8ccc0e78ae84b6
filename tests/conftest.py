"""Fixtures: embedded servers, a scripted upstream over real HTTP, the server as users run it."""

import contextlib
import gc
import importlib
import os
import socket
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path

import asyncpg
import certifi
import openai
import pytest

from app import embedded, migrate
from tests.servers import Served
from tests.toolserver import Toolserver
from tests.upstream import Upstream

NewServer = Callable[..., Served]
"""Settings → a server with a database of its own, which ends with the test."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """Each worker of xdist first imports its share of the files: what it has rewritten and compiled, the others only read."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    here = session.config.invocation_params.dir
    paths = sorted(path for one in session.config.args for path in (here / one).glob("**/test_*.py"))
    first = len(paths) * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) // workers
    for path in (paths[first:] + paths[:first]) * (workers > 1):
        with contextlib.suppress(Exception):  # that is found again, and reported, when the file is collected
            importlib.import_module(".".join(path.relative_to(session.config.rootpath).with_suffix("").parts))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files, which stand beside this one, come first: at the end one worker would be left with the last of them."""
    items.sort(key=lambda item: item.path.parent != Path(__file__).parent)


def pytest_collection_finish() -> None:
    """Exempt thousands of tests and their modules from garbage collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _one_certificate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test uses TLS, but every HTTP client reads all certificates of the machine first, which takes 50 ms."""
    first, end, _ = certifi.contents().partition("-----END CERTIFICATE-----\n")
    path = tmp_path_factory.mktemp("certificates") / "first.pem"
    path.write_text(first + end)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(path))
        yield


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[embedded.Embedded]:
    """Postgres and Valkey for the whole session; they need not survive a power cut."""
    with embedded.start(tmp_path_factory.mktemp("servers"), durable=False) as running:
        yield running


@pytest.fixture(scope="session")
def upstream() -> Iterator[Upstream]:
    """The scripted upstream; a test's last user message is its script."""
    with Upstream() as running:
        yield running


@pytest.fixture(scope="session")
def toolserver() -> Iterator[Toolserver]:
    """The scripted MCP server; a test finds its calls under a name of its own."""
    with Toolserver() as running:
        yield running


@pytest.fixture(scope="session")
def template(servers: embedded.Embedded) -> str:
    """A database with the tables, to be copied."""
    url = _database_url(servers, "template_reprise")
    _execute(servers, "create database template_reprise")
    migrate.upgrade(url)
    return "template_reprise"


def _database_url(servers: embedded.Embedded, name: str) -> str:
    return servers.database_url.replace("@/postgres?", f"@/{name}?")


def _execute(servers: embedded.Embedded, statement: str) -> None:
    import asyncio

    async def execute() -> None:
        connection = await asyncpg.connect(servers.database_url)
        try:
            await connection.execute(statement)
        finally:
            await connection.close()

    asyncio.run(execute())


@pytest.fixture(scope="session")
def new_database(servers: embedded.Embedded, template: str) -> Callable[[], str]:
    """Makes an empty database with the tables; gives its URL."""

    def make() -> str:
        name = f"test_{uuid.uuid4().hex}"
        _execute(servers, f"create database {name} template {template}")
        return _database_url(servers, name)

    return make


@pytest.fixture(scope="session")
def base_env(
    servers: embedded.Embedded, upstream: Upstream, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, str]:
    """Settings of a server under test: everything but its database."""
    return {
        "REDIS_URL": servers.redis_url,
        "OPENAI_BASE_URL": upstream.base_url,
        "REPRISE_DATA_DIR": str(tmp_path_factory.mktemp("data")),
        "REPRISE_OUTBOUND_ALLOW": "127.0.0.1/32",
    }


@pytest.fixture(scope="session")
def server(base_env: Mapping[str, str], new_database: Callable[[], str]) -> Iterator[Served]:
    """The server that most tests share, with its default settings."""
    with Served({**base_env, "DATABASE_URL": new_database()}) as running:
        yield running


@pytest.fixture
def new_server(base_env: Mapping[str, str], new_database: Callable[[], str]) -> Iterator[NewServer]:
    """Starts servers with settings of their own, each on an empty database unless DATABASE_URL is given."""
    started: list[Served] = []

    def start(**env: str) -> Served:
        settings = {**base_env, **env}
        if "DATABASE_URL" not in settings:
            settings["DATABASE_URL"] = new_database()
        started.append(Served(settings))
        return started[-1]

    yield start
    for one in started:
        one.__exit__()


@pytest.fixture(scope="module")
def new_cataloged(
    base_env: Mapping[str, str], new_database: Callable[[], str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[NewServer]:
    """Starts servers with a catalog (TOML), each on an empty database; they end with the module."""
    with contextlib.ExitStack() as running:

        def start(toml: str, **env: str) -> Served:
            path = tmp_path_factory.mktemp("catalog") / "catalog.toml"
            path.write_text(toml)
            settings = {"REPRISE_CATALOG": str(path), "DATABASE_URL": new_database(), **env}
            return running.enter_context(Served({**base_env, **settings}))

        yield start


@pytest.fixture(autouse=True)
def _server_output(request: pytest.FixtureRequest) -> Iterator[None]:
    """What the shared server printed during a test is shown with its failure."""
    shared = request.getfixturevalue("server") if "server" in request.fixturenames else None
    begun = len(shared.printed) if shared else 0
    yield
    if shared:
        print("".join(shared.printed[begun:]))  # captured, and shown only for a failed test


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[openai.OpenAI]:
    """The official client of the shared server, or of the module's own."""
    with server.client() as made:
        yield made


@pytest.fixture(scope="session")
async def async_client(server: Served) -> AsyncIterator[openai.AsyncOpenAI]:
    """The official client of the shared server, for concurrent tests."""
    async with server.async_client() as made:
        yield made


class Silent:
    """An address that takes connections and answers nothing."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/v1"


@pytest.fixture
def silent() -> Iterator[Silent]:
    """An upstream that answers nothing."""
    made = Silent()
    with made.listener:
        yield made


@pytest.fixture
def catalog_file(tmp_path: Path) -> Callable[[str], str]:
    """Writes a catalog; gives its path."""

    def write(toml: str) -> str:
        path = tmp_path / "catalog.toml"
        path.write_text(toml)
        return str(path)

    return write
