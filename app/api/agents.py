"""`/v1/agents`: the agents that a caller may use, and their administration."""

from typing import Any

from litestar import Controller, Request, Response, delete, get, post
from msgspec import UNSET

from app.api import pages, queries
from app.api.replies import json_reply, small_reply
from app.api.services import Services
from app.domain import agents
from app.domain.agents import NamedAgent
from app.domain.rights import Rights
from app.offload import offload
from app.runs.admission import Caller
from app.storage.pages import Page
from app.wire.agents import Agent
from app.wire.requests import PromptParameters
from app.wire.resources import Deleted, encode
from app.wire.tools import encode_tools

READING = {"scope": None}  # any key may ask what it may use
WRITING = {"scope": "admin"}


class AgentsController(Controller):
    """Agents of the catalog and of the caller's tenant. A path names one by its id, or by its name."""

    path = "/v1/agents"

    @post(status_code=200, opt=WRITING)
    async def create(self, request: Request[Any, Any, Any], caller: Caller, services: Services) -> Response[Any]:
        """A new agent of the tenant."""
        asked = await services.bodies.decoded(request, agents.CREATE)
        return await _reply(services, caller, await services.agents.create(caller.rights, asked))

    @get(opt={**READING, **queries.TAKEN})
    async def list(self, request: Request[Any, Any, Any], caller: Caller, services: Services) -> Response[Any]:
        """Agents by creation; those of the catalog are the oldest."""
        query = queries.parse(request, queries.AgentPage)

        async def read(bytes_max: int) -> tuple[int, Page[NamedAgent] | None]:
            return await services.agents.page(
                caller.rights,
                after=query.after,
                limit=query.limit,
                order=query.order,
                page_bytes=services.settings.page_bytes_max,
                bytes_max=bytes_max,
            )

        def write(page: Page[NamedAgent]) -> bytes:
            rows = [(agent.id, _shown(agent, caller.rights)) for agent in page.rows]
            return pages.encoded(rows, has_more=page.has_more)

        return await pages.read(services, read, write)

    @get("/{agent_id:str}", opt=READING)
    async def retrieve(self, agent_id: str, caller: Caller, services: Services) -> Response[Any]:
        """One agent."""
        return await _reply(services, caller, await services.agents.get(caller.rights, agent_id))

    @post("/{agent_id:str}", status_code=200, opt=WRITING)
    async def update(
        self, request: Request[Any, Any, Any], agent_id: str, caller: Caller, services: Services
    ) -> Response[Any]:
        """Replace some of an agent's parameters."""
        given = await services.bodies.decoded(request, agents.UPDATE)
        return await _reply(services, caller, await services.agents.update(caller.rights, agent_id, given))

    @delete("/{agent_id:str}", status_code=200, opt=WRITING)
    async def delete(self, agent_id: str, caller: Caller, services: Services) -> Response[bytes]:
        """Delete an agent. Its responses stay as they are."""
        return small_reply(Deleted(await services.agents.delete(caller.rights, agent_id), "agent.deleted"))


async def _reply(services: Services, caller: Caller, agent: NamedAgent) -> Response[Any]:
    body = await offload(agent.bytes, _shown, agent, caller.rights)
    return json_reply(body, services.backlogs)


def _shown(named: NamedAgent, rights: Rights) -> bytes:
    agent = named.agent
    parameters = {name: getattr(agent, name) for name in PromptParameters.__struct_fields__}
    return encode(
        Agent(
            id=named.id,
            name=named.name,
            created_at=named.created_at,
            updated_at=named.updated_at,
            description=agent.description,
            instructions=agent.instructions,
            variables=dict(agent.variables),
            overrides=agent.overrides,
            users=agent.users if "admin" in rights.scopes else UNSET,
            **parameters | {"tools": encode_tools(named.tools)},
        ).in_order
    )
