"""What real clients need to use this server: `reprise connect` prints it, docs/clients.md shows it, `make clients` runs it."""

from string import Template

from msgspec import Struct


class Client(Struct, frozen=True, kw_only=True):
    """A client, and the lines that connect it; `$url`, `$model` and `$key` in them are placeholders."""

    name: str
    text: str
    file: str
    """Where the lines belong."""
    run: str

    def lines(self, url: str, model: str, key: str) -> str:
        """The lines for a server, without the newline at their end."""
        return Template(self.text.strip()).substitute(url=url, model=model, key=key)

    def command(self, key: str) -> str:
        """The command that asks "Hello", once the lines are there."""
        return Template(self.run).substitute(key=key)


CLIENTS = {
    "openai": Client(
        name="OpenAI SDK for Python",
        file="hello.py",
        run="python hello.py",
        text="""
from openai import OpenAI

client = OpenAI(base_url="$url", api_key="$key")
print(client.responses.create(model="$model", input="Hello").output_text)
""",
    ),
    "openai-node": Client(
        name="OpenAI SDK for Node.js",
        file="hello.mjs",
        run="node hello.mjs",
        text="""
import OpenAI from "openai";

const client = new OpenAI({ baseURL: "$url", apiKey: "$key" });
const response = await client.responses.create({ model: "$model", input: "Hello" });
console.log(response.output_text);
""",
    ),
    "agents": Client(
        name="OpenAI Agents SDK, with a conversation as its session",
        file="hello.py",
        run="python hello.py",
        text="""
from agents import Agent, OpenAIConversationsSession, Runner, set_default_openai_client, set_tracing_disabled
from openai import AsyncOpenAI

client = AsyncOpenAI(base_url="$url", api_key="$key")
set_default_openai_client(client)
set_tracing_disabled(True)  # traces would go to OpenAI
agent = Agent(name="Assistant", model="$model")
print(Runner.run_sync(agent, "Hello", session=OpenAIConversationsSession(openai_client=client)).final_output)
""",
    ),
    "langchain": Client(
        name="LangChain",
        file="hello.py",
        run="python hello.py",
        text="""
from langchain_openai import ChatOpenAI

model = ChatOpenAI(model="$model", base_url="$url", api_key="$key", use_responses_api=True)
print(model.invoke("Hello").text)
""",
    ),
    "langchain-chat": Client(
        name="LangChain, over Chat Completions",
        file="hello.py",
        run="python hello.py",
        text="""
from langchain_openai import ChatOpenAI

model = ChatOpenAI(model="$model", base_url="$url", api_key="$key")
print(model.invoke("Hello").text)
""",
    ),
    "llama-index": Client(
        name="LlamaIndex, over Chat Completions",
        file="hello.py",
        run="python hello.py",
        text="""
from llama_index.llms.openai_like import OpenAILike

model = OpenAILike(
    model="$model",
    api_base="$url",
    api_key="$key",
    is_chat_model=True,
    is_function_calling_model=True,
)
print(model.complete("Hello"))
""",
    ),
    "litellm": Client(
        name="LiteLLM, over Chat Completions",
        file="hello.py",
        run="python hello.py",
        text="""
from litellm import completion

messages = [{"role": "user", "content": "Hello"}]
response = completion(model="openai/$model", api_base="$url", api_key="$key", messages=messages)
print(response.choices[0].message.content)
""",
    ),
    "pydantic-ai": Client(
        name="Pydantic AI",
        file="hello.py",
        run="python hello.py",
        text="""
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

model = OpenAIResponsesModel("$model", provider=OpenAIProvider(base_url="$url", api_key="$key"))
print(Agent(model).run_sync("Hello").output)
""",
    ),
    "ai-sdk": Client(
        name="Vercel AI SDK",
        file="hello.mjs",
        run="node hello.mjs",
        text="""
import { createOpenAI } from "@ai-sdk/openai";
import { generateText } from "ai";

const reprise = createOpenAI({ baseURL: "$url", apiKey: "$key" });
const { text } = await generateText({ model: reprise.responses("$model"), prompt: "Hello" });
console.log(text);
""",
    ),
    "codex": Client(
        name="Codex CLI",
        file="~/.codex/config.toml",
        run="REPRISE_API_KEY=$key codex exec --skip-git-repo-check Hello",
        text="""
model = "$model"
model_provider = "reprise"

[model_providers.reprise]
name = "Reprise"
base_url = "$url"
wire_api = "responses"
env_key = "REPRISE_API_KEY"
""",
    ),
    "opencode": Client(
        name="opencode",
        file="opencode.json",
        run="opencode run Hello",
        text="""
{
  "model": "reprise/$model",
  "provider": {
    "reprise": {
      "npm": "@ai-sdk/openai",
      "options": { "baseURL": "$url", "apiKey": "$key" },
      "models": { "$model": {} }
    }
  }
}
""",
    ),
    "llm": Client(
        name="llm, over Chat Completions",
        file="~/.config/io.datasette.llm/extra-openai-models.yaml",
        run="llm -m reprise --key $key Hello",
        text="""
- model_id: reprise
  model_name: $model
  api_base: "$url"
""",
    ),
    "open-webui": Client(
        name="Open WebUI, over Chat Completions",
        file="open-webui.env",
        run="env $$(cat open-webui.env) open-webui serve",
        text="""
OPENAI_API_BASE_URL=$url
OPENAI_API_KEY=$key
DEFAULT_MODELS=$model
ENABLE_OLLAMA_API=False
""",
    ),
    "librechat": Client(
        name="LibreChat, over Chat Completions",
        file="librechat.yaml",
        run="npm run backend",
        text="""
version: 1.2.8
endpoints:
  custom:
    - name: Reprise
      baseURL: "$url"
      apiKey: "$key"
      models:
        default: ["$model"]
        fetch: true
      titleConvo: true
      titleModel: current_model
""",
    ),
}
"""The name on the command line → the client."""
