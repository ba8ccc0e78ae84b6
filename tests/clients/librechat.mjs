// What LibreChat sends for a custom endpoint: its own package of agents, with the options that its server gives that, against a server
// whose upstream is the scripted one. `make librechat` runs it; librechat_server.py runs the application itself.

import assert from "node:assert/strict";
import { test } from "node:test";

import { AIMessage, HumanMessage } from "@langchain/core/messages";
import { tool } from "@langchain/core/tools";
import {
  ChatModelStreamHandler, createContentAggregator, GraphEvents, ModelEndHandler, Providers, Run, ToolEndHandler,
} from "@librechat/agents";

const baseURL = process.env.REPRISE_URL;
const PIXEL =
  "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==";

const script = (...turns) => turns.map((steps) => JSON.stringify(steps)).join("\n");
const finish = (reason = "stop") => ({ finish: reason });
const WEATHER = script(
  [{ call: { index: 0, id: "call_1", name: "weather", arguments: '{"city": "Oslo"}' } }, finish("tool_calls")],
  [{ text: "It is " }, { text: "sunny." }, finish()],
);
const weather = tool(async ({ city }) => `sun in ${city}`, {
  name: "weather",
  description: "The weather.",
  schema: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
});
const clientOptions = {
  streaming: true, streamUsage: false, model: "scripted", user: "64f0c0ffee", apiKey: "none", configuration: { baseURL },
};

/** The parts of an answer, the usage that it reported, and the run; `added` is what `addParams` adds. */
async function ask(messages, tools = [], added = {}) {
  const { contentParts, aggregateContent } = createContentAggregator();
  const usage = [];
  const aggregated = ["ON_RUN_STEP", "ON_RUN_STEP_COMPLETED", "ON_RUN_STEP_DELTA", "ON_MESSAGE_DELTA", "ON_REASONING_DELTA"];
  const customHandlers = {
    [GraphEvents.TOOL_END]: new ToolEndHandler(),
    [GraphEvents.CHAT_MODEL_END]: new ModelEndHandler(usage),
    [GraphEvents.CHAT_MODEL_STREAM]: new ChatModelStreamHandler(),
  };
  for (const name of aggregated) {
    customHandlers[GraphEvents[name]] = { handle: (event, data) => aggregateContent({ event, data }) };
  }
  const llmConfig = { provider: Providers.OPENAI, ...clientOptions, ...added };
  const graphConfig = { type: "standard", llmConfig, tools, instructions: "You are kind." };
  const run = await Run.create({ runId: crypto.randomUUID(), graphConfig, returnContent: true, customHandlers });
  const config = { configurable: { thread_id: "t", user_id: "u" }, streamMode: "values", version: "v2" };
  await run.processStream({ messages }, config);
  return { parts: contentParts.filter(Boolean), usage, run };
}

const textOf = (parts) => parts.filter((part) => part.type === "text").map((part) => part.text).join("");

test("a message is answered, and the conversation gets a title", async () => {
  const { parts, run } = await ask([new HumanMessage("Hello there")]);
  assert.equal(textOf(parts), "ok: Hello there");
  const titled = { provider: Providers.OPENAI, inputText: "Hello there", contentParts: parts, chainOptions: {} };
  const { streaming, ...titleOptions } = clientOptions; // LibreChat leaves it out, too
  const { title } = await run.generateTitle({ ...titled, clientOptions: titleOptions, titleMethod: "completion" });
  assert.match(title, /^ok: /);
});

test("a conversation continues", async () => {
  const { parts } = await ask([new HumanMessage("a"), new AIMessage("b"), new HumanMessage("c")]);
  assert.equal(textOf(parts), "ok: c");
});

test("usage is told to those who ask for it", async () => {
  const [told] = (await ask([new HumanMessage("Hello there")], [], { streamUsage: true })).usage;
  assert.equal(told.output_tokens, 3);
});

for (const [api, added] of [["Chat Completions", {}], ["Responses", { useResponsesApi: true }]]) {
  test(`tools are called over ${api}`, async () => {
    const { parts } = await ask([new HumanMessage(WEATHER)], [weather], added);
    const [called] = parts.filter((part) => part.type === "tool_call");
    assert.equal(called.tool_call.output, "sun in Oslo");
    assert.equal(textOf(parts), "It is sunny.");
  });
}

test("reasoning is shown apart from the answer", async () => {
  const steps = script([{ reasoning_content: "Hm." }, { text: "Yes." }, finish()]);
  const { parts } = await ask([new HumanMessage(steps)]);
  assert.deepEqual(parts.map((part) => part.think ?? part.text), ["Hm.", "Yes."]);
  const summarized = { useResponsesApi: true, reasoning: { summary: "auto" } }; // what it shows over Responses
  const { parts: summary } = await ask([new HumanMessage(steps)], [], summarized);
  assert.deepEqual(summary.map((part) => part.think ?? part.text), ["Hm.", "Yes."]);
});

test("images are seen", async () => {
  const image = { type: "image_url", image_url: { url: PIXEL, detail: "auto" } };
  const { parts } = await ask([new HumanMessage({ content: [{ type: "text", text: "see" }, image] })]);
  assert.equal(textOf(parts), "ok: see");
});

test("models are listed", async () => {
  const listed = await (await fetch(`${baseURL}/models`, { headers: { authorization: "Bearer none" } })).json();
  assert.ok(listed.data.some((model) => model.id === "scripted"));
});
