"""For operators and newcomers: a home page, liveness and readiness."""

from litestar import Response, get
from litestar.enums import MediaType

from app.api.services import Services
from app.errors import ServerUnavailable
from app.storage.readiness import demand_ready

HOME = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Reprise</title>
<h1>Reprise</h1>
<p>A persistent, stateful Responses API server. Clients of the OpenAI API find it under <code>/v1</code> on this address.</p>
<ul>
<li><a href="/docs">/docs</a>: the reference of the API, from <a href="/openapi.json">/openapi.json</a></li>
<li><a href="/v1/models">/v1/models</a>: what may be asked for as <code>model</code></li>
<li><code>POST /v1/responses</code>, <code>POST /v1/chat/completions</code>: as <a href="https://platform.openai.com/docs/api-reference/responses">OpenAI
describes them</a>; <code>docs/api.md</code> says what this server does with each parameter</li>
<li><a href="/livez">/livez</a>, <a href="/readyz">/readyz</a>: whether the process runs, and whether it is ready</li>
<li><code>README.md</code> and <code>docs/</code> of the project: settings, tools, catalog, deployment; <code>reprise doctor</code> checks
a configuration</li>
</ul>
</html>
"""


@get("/", media_type=MediaType.HTML)
async def home() -> str:
    """A page for a browser: what this server is, and its paths."""
    return HOME


@get("/livez", media_type=MediaType.TEXT)
async def livez() -> str:
    """The process runs."""
    return "ok"


@get("/readyz", media_type=MediaType.TEXT)
async def readyz(services: Services) -> Response[str]:
    """Requests can be served: the process is not shutting down, Postgres takes writes and has the schema. Else 503."""
    if services.claims.is_draining:
        raise ServerUnavailable("The server is shutting down.")
    await demand_ready(services.database, services.outdated_schemas)
    return Response("ok", media_type=MediaType.TEXT)
