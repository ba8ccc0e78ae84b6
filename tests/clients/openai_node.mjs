// The official SDK for Node.js against a server whose upstream is the scripted one: `node --test` runs it, as `make clients` does.

import assert from "node:assert/strict";
import { test } from "node:test";

import OpenAI, { toFile } from "openai";
import { ResponsesToolRunner } from "openai/helpers/responses-tool-runner";

const { REPRISE_URL, UPSTREAM_URL, MCP_URL } = process.env;
const client = new OpenAI({ baseURL: REPRISE_URL, apiKey: "none", maxRetries: 0 });
const PIXEL =
  "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==";

/** The user message that makes the upstream take these steps, an array for each of its turns. */
const script = (...turns) => turns.map((steps) => JSON.stringify(steps)).join("\n");
const words = (count) => Array.from({ length: count }, (_, number) => ({ text: `${number} ` }));
const finish = (reason = "stop") => ({ finish: reason });
const open = (gate) => fetch(new URL(`/gates/${gate}`, UPSTREAM_URL), { method: "POST" });

const create = (input, more = {}) => client.responses.create({ model: "scripted", input, ...more });
const message = (content, role = "user") => ({ type: "message", role, content });

async function all(listing) {
  const found = [];
  for await (const one of listing) found.push(one);
  return found;
}

const textsOf = (items) => items.map((item) => item.content[0].text);

/** Checks what every stream holds: numbers without gaps, and one end, whose response is the stored one. Gives that. */
async function checked(events) {
  events.forEach((event, number) => assert.equal(event.sequence_number, number));
  const made = events.at(-1).response;
  const { output_text, ...stored } = await client.responses.retrieve(made.id);
  assert.deepEqual(stored, made);
  const parts = made.output.filter((item) => item.type === "message").flatMap((item) => item.content);
  assert.equal(output_text, parts.map((part) => part.text ?? "").join(""));
  return made;
}

test("a response is created, retrieved, listed and deleted", async () => {
  const first = await create("My name is Ada.", { metadata: { topic: "names" } });
  assert.equal(first.output_text, "ok: My name is Ada.");
  const second = await create("What is my name?", { previous_response_id: first.id });
  const retrieved = await client.responses.retrieve(first.id);
  assert.deepEqual(retrieved, first);
  const inputs = client.responses.inputItems.list(second.id, { order: "asc", limit: 1 });
  assert.deepEqual(textsOf(await all(inputs)), ["My name is Ada.", "ok: My name is Ada.", "What is my name?"]);
  await client.responses.delete(first.id);
  await assert.rejects(client.responses.retrieve(first.id), OpenAI.NotFoundError);
  const third = await create("And now?", { previous_response_id: second.id });
  assert.equal((await all(client.responses.inputItems.list(third.id, { limit: 2 }))).length, 5);
});

test("a stream is what the stored response holds", async () => {
  const steps = [{ reasoning_content: "Hm." }, ...words(5), finish()];
  const more = { stream: true, include: ["reasoning.encrypted_content"] };
  const made = await checked(await all(await create(script(steps), more)));
  assert.deepEqual(made.output.map((item) => item.type), ["reasoning", "message"]);
});

test("the helper for streams folds every kind of item into the stored response", async () => {
  const call = (call) => [{ call: { index: 0, type: "function", ...call } }, finish("tool_calls")];
  const tools = [
    { type: "function", name: "look", parameters: { type: "object", properties: {} }, strict: false },
    { type: "custom", name: "note" },
    { type: "shell" },
    { type: "apply_patch" },
  ];
  const kinds = {
    reasoning: [{ reasoning_content: "Let me " }, { reasoning_content: "see." }, { text: "Yes." }, finish()],
    refusal: [{ refusal: "No, " }, { refusal: "sorry." }, finish()],
    function_call: [{ text: "Looking." }, ...call({ id: "c1", name: "look", arguments: '{"at": "sea"}' })],
    custom_tool_call: call({ id: "c2", name: "note", arguments: '{"input": "one\\ntwo"}' }),
    shell_call: call({ id: "c3", name: "shell", arguments: '{"commands": ["ls", "pwd"]}' }),
    incomplete: [...words(2), finish("length")],
  };
  for (const [kind, steps] of Object.entries(kinds)) {
    for (const background of [false, true]) {
      const asked = { model: "scripted", input: script(steps), tools, background, reasoning: { summary: "auto" } };
      const stream = client.responses.stream(asked);
      const events = await all(stream);
      const final = await stream.finalResponse();
      const made = await checked(events);
      assert.equal(made.status, kind === "incomplete" ? "incomplete" : "completed", kind);
      assert.deepEqual(final.output.map((item) => item.id), made.output.map((item) => item.id), kind);
      if (kind.endsWith("_call")) assert.equal(made.output.at(-1).type, kind);
    }
  }
});

test("the SDK's runner of tools takes every turn", async () => {
  const tool = { type: "function", name: "look", parameters: { type: "object", properties: {} }, strict: false };
  const mcp = { type: "mcp", server_label: "box", server_url: MCP_URL, require_approval: "always" };
  const call = (id, name, index, args) => ({ call: { index, type: "function", id, name, arguments: JSON.stringify(args) } });
  const input = script(
    [{ reasoning_content: "Two." }, call("c1", "look", 0, { at: "sea" }), call("c2", "look", 1, {}), finish("tool_calls")],
    [{ text: "And:" }, call("c3", "echo", 0, { text: "hi" }), finish("tool_calls")],
    [{ text: "Seen." }, finish()],
  );
  for (const options of [{}, { stream: true }, { stream: true, eager: true }]) {
    for (const store of [true, false]) {
      const looked = [];
      const execute = async (args) => `${looked.push(args)}`;
      const runner = new ResponsesToolRunner({ functions: [{ tool, execute }] });
      const asked = { model: "scripted", input: [message(input)], tools: [mcp], store };
      const done = await runner.run(client, asked, { ...options, approveMcp: () => true });
      assert.deepEqual([done.status, done.output.at(-1).content[0].text], ["completed", "Seen."]);
      assert.equal(done.output.find((item) => item.type === "mcp_call").status, "completed");
      assert.deepEqual(looked, [{ at: "sea" }, {}]);
    }
  }
});

test("structured output is parsed", async () => {
  const format = { type: "json_schema", name: "place", schema: { type: "object", properties: {} }, strict: false };
  const input = script([{ text: '{"at": ' }, { text: '"sea"}' }, finish()]);
  const { output_parsed, output_text } = await client.responses.parse({ model: "scripted", input, text: { format } });
  assert.deepEqual([output_parsed, output_text], [{ at: "sea" }, '{"at": "sea"}']);
});

test("a background stream is resumed where it broke off", async () => {
  const input = script([...words(20), { gate: "node-resume" }, ...words(20), finish()]);
  const events = [];
  for await (const event of await create(input, { background: true, stream: true })) {
    events.push(event);
    if (event.type === "response.output_text.delta") break;
  }
  const { id } = events[0].response;
  assert.equal((await client.responses.retrieve(id)).status, "in_progress");
  const after = { stream: true, starting_after: events.at(-1).sequence_number };
  for await (const event of await client.responses.retrieve(id, after)) {
    events.push(event);
    if (event.delta === "10 ") await open("node-resume");
  }
  const made = await checked(events);
  assert.equal(made.output[0].content[0].text, [...words(20), ...words(20)].map((step) => step.text).join(""));
  const helper = client.responses.stream({ response_id: id, starting_after: 5 });
  assert.deepEqual((await all(helper)).map((event) => event.sequence_number), events.map((_, number) => number).slice(6));
});

test("a background response is polled and cancelled", async () => {
  const polled = await create("Later.", { background: true });
  assert.equal(polled.status, "queued");
  let now = polled;
  while (["queued", "in_progress"].includes(now.status)) now = await client.responses.retrieve(polled.id);
  assert.equal(now.output_text, "ok: Later.");
  const waiting = await create(script([{ text: "so far" }, { gate: "node-never" }]), { background: true });
  assert.equal((await client.responses.cancel(waiting.id)).status, "cancelled");
  assert.equal((await client.responses.cancel(waiting.id)).status, "cancelled");
  assert.equal((await client.responses.cancel(polled.id)).status, "completed");
  const whole = await create("At once.");
  await assert.rejects(client.responses.cancel(whole.id), OpenAI.BadRequestError);
});

test("a conversation is changed by its eight endpoints", async () => {
  const { conversations } = client;
  const made = await conversations.create({ metadata: { topic: "demo" }, items: [message("0")] });
  assert.deepEqual(await conversations.retrieve(made.id), made);
  assert.deepEqual((await conversations.update(made.id, { metadata: { topic: "other" } })).metadata, { topic: "other" });
  const numbers = Array.from({ length: 20 }, (_, number) => `${number + 1}`);
  const added = await conversations.items.create(made.id, { items: numbers.map((number) => message(number)) });
  assert.deepEqual([added.object, added.has_more, ...textsOf(added.data)], ["list", false, ...numbers]);
  const every = ["0", ...numbers];
  for (const limit of [1, 7, 21, 100]) {
    assert.deepEqual(textsOf(await all(conversations.items.list(made.id, { order: "asc", limit }))), every);
    assert.deepEqual(textsOf(await all(conversations.items.list(made.id, { limit }))), every.toReversed());
  }
  const [first, second] = added.data;
  const of = { conversation_id: made.id };
  assert.deepEqual(await conversations.items.retrieve(first.id, of), first);
  assert.equal((await conversations.items.delete(first.id, of)).id, made.id);
  await assert.rejects(conversations.items.retrieve(first.id, of), OpenAI.NotFoundError);
  assert.equal((await conversations.items.retrieve(second.id, { ...of, include: ["message.output_text.logprobs"] })).id, second.id);
  assert.deepEqual(await conversations.delete(made.id), { id: made.id, object: "conversation.deleted", deleted: true });
  await assert.rejects(conversations.retrieve(made.id), OpenAI.NotFoundError);
  assert.deepEqual((await conversations.create()).metadata, {});
});

test("responses continue a conversation, streamed and in the background", async () => {
  const { id } = await client.conversations.create({ items: [message("I am Ada.")] });
  const stream = client.responses.stream({ model: "scripted", input: "first", conversation: id });
  assert.deepEqual((await stream.finalResponse()).conversation, { id });
  await checked(await all(await create("second", { conversation: { id }, background: true, stream: true })));
  const listed = await all(client.conversations.items.list(id, { order: "asc", limit: 2 }));
  assert.deepEqual(textsOf(listed), ["I am Ada.", "first", "ok: first", "second", "ok: second"]);
  const busy = await create(script([{ text: "busy" }, { gate: "node-locked" }, finish()]), { conversation: id, stream: true });
  for await (const event of busy) {
    if (event.type !== "response.created") continue;
    const locked = await create("me, too", { conversation: id }).catch((error) => error);
    assert.ok(locked instanceof OpenAI.BadRequestError);
    assert.deepEqual([locked.code, locked.param], ["conversation_locked", "conversation"]);
    await open("node-locked");
  }
});

test("a context is compacted and counted", async () => {
  const first = await create("My name is Ada.");
  const asked = { model: "scripted", input: "And mine?", previous_response_id: first.id };
  const input_tokens = "My name is Ada. ok: My name is Ada. And mine?".split(" ").length;
  const counted = await client.responses.inputTokens.count(asked);
  assert.deepEqual(counted, { object: "response.input_tokens", input_tokens });
  const compacted = await client.responses.compact({ model: "scripted", previous_response_id: first.id });
  assert.equal(compacted.object, "response.compaction");
  assert.equal(compacted.output.at(-1).type, "compaction");
  const next = await create([...compacted.output, message("What is my name?")]);
  assert.equal(next.output_text, "ok: What is my name?");
});

test("reasoning goes back sealed where nothing is stored", async () => {
  const made = await create(script([{ reasoning_content: "Hm." }, { text: "Yes." }, finish()]), { store: false });
  const [reasoning] = made.output;
  assert.ok(reasoning.encrypted_content);
  const again = await create([message("?"), ...made.output, message("More.")], { store: false });
  assert.equal(again.output_text, "ok: More.");
  await assert.rejects(client.responses.retrieve(made.id), OpenAI.NotFoundError);
});

test("a file is uploaded, listed, read, used by its id and deleted", async () => {
  const bytes = Buffer.from(PIXEL, "base64");
  const made = await client.files.create({ file: await toFile(bytes, "pixel ü.png", { type: "image/png" }), purpose: "vision" });
  assert.deepEqual([made.filename, made.bytes, made.purpose], ["pixel ü.png", bytes.length, "vision"]);
  assert.deepEqual(await client.files.retrieve(made.id), made);
  const other = await client.files.create({ file: new File(["text"], "a.txt"), purpose: "user_data" });
  const ids = (await all(client.files.list({ limit: 1, order: "asc" }))).map((file) => file.id);
  assert.deepEqual(ids, [made.id, other.id]);
  assert.deepEqual((await all(client.files.list({ purpose: "vision" }))).map((file) => file.id), [made.id]);
  assert.deepEqual(Buffer.from(await (await client.files.content(made.id)).arrayBuffer()), bytes);
  const image = { type: "input_image", file_id: made.id, detail: "auto" };
  const seen = await create([message([{ type: "input_text", text: "What is it?" }, image])]);
  assert.equal(seen.output_text, "ok: What is it?");
  assert.equal((await client.files.delete(made.id)).deleted, true);
  await assert.rejects(client.files.content(made.id), OpenAI.NotFoundError);
});

test("errors are of the SDK's classes, with param and code", async () => {
  const refused = async (promise, Kind, expected) => {
    const error = await promise.then(() => assert.fail("not refused"), (error) => error);
    assert.ok(error instanceof Kind, `${error}`);
    const { status, type, code, param } = error;
    assert.deepEqual({ status, type, code, param }, { type: "invalid_request_error", code: null, param: null, ...expected });
    assert.ok(error.requestID);
  };
  const { BadRequestError, NotFoundError } = OpenAI;
  await refused(create("x", { temprature: 1 }), BadRequestError, { status: 400, code: "unknown_parameter", param: "temprature" });
  await refused(create([message(7)]), BadRequestError, { status: 400, code: "invalid_type", param: "input[0].content" });
  await refused(create("x", { previous_response_id: "resp_none" }), BadRequestError, {
    status: 400,
    code: "previous_response_not_found",
    param: "previous_response_id",
  });
  await refused(client.responses.retrieve("resp_none"), NotFoundError, { status: 404 });
  await refused(client.conversations.items.list("conv_none"), NotFoundError, { status: 404 });
  await refused(client.files.retrieve("file-none"), NotFoundError, { status: 404, param: "id" });
  await refused(client.conversations.items.list("conv_none", { limit: 101 }), BadRequestError, { status: 400, code: "invalid_value", param: "limit" });
});

test("models are listed and retrieved", async () => {
  const [first] = await all(client.models.list());
  assert.deepEqual(await client.models.retrieve(first.id), first);
});
