"""`python -m tests.bench.upstream`: a Chat Completions server that costs next to nothing.

The model's name is the script: `bench-200x5` says 200 words, one every 5 ms; without a pace (`x0`) all at once. Each word is
the moment when it was sent (nanoseconds of the monotonic clock, which all processes of a machine share), so that its
receiver knows its latency. `bench-8x0-8calls` makes 8 calls of the first tool first, up to 3 in a turn;
`bench-8x5-10wait` reads the prompt for 10 ms, as models do: the head of its answer goes at once, the first word then.
"""

import asyncio
import re
import sys
import time

import uvloop

from tests.bench.http import JSON_HEAD, STREAM_HEAD, Serving, chunked

MODEL = re.compile(rb'"model": ?"bench-(\d+)x(\d+)(?:-(\d+)calls)?(?:-(\d+)wait)?"')
TOOL = re.compile(rb'"tools":.*?"name": ?"(\w+)"')
CALLS_IN_TURN = 3
STREAMS = re.compile(rb'"stream": ?true')
CHUNK = (
    b'data: {"id":"chatcmpl-bench","object":"chat.completion.chunk","created":1,"model":"bench","choices":'
    b'[{"index":0,"delta":{"content":"%d "},"finish_reason":null}]}\n\n'
)
CALL = b'{"index":%d,"id":"call_%d","type":"function","function":{"name":"%b","arguments":"{\\"number\\": %d}"}}'
CALLS = (
    b'data: {"id":"chatcmpl-bench","object":"chat.completion.chunk","created":1,"model":"bench","choices":'
    b'[{"index":0,"delta":{"tool_calls":[%b]},"finish_reason":"tool_calls"}]}\n\ndata: [DONE]\n\n'
)
LAST = (
    b'data: {"id":"chatcmpl-bench","object":"chat.completion.chunk","created":1,"model":"bench","choices":'
    b'[{"index":0,"delta":{},"finish_reason":"stop"}],'
    b'"usage":{"prompt_tokens":10,"completion_tokens":10,"total_tokens":20}}\n\ndata: [DONE]\n\n'
)
WHOLE = (
    b'{"id":"chatcmpl-bench","object":"chat.completion","created":1,"model":"bench","choices":[{"index":0,"message":'
    b'{"role":"assistant","content":"%b"},"finish_reason":"stop"}],'
    b'"usage":{"prompt_tokens":10,"completion_tokens":10,"total_tokens":20}}'
)


class Upstream(Serving):
    """One connection."""

    def answer(self, body: bytes) -> None:
        asked = MODEL.search(body)
        assert asked, body[:200]
        self._words, self._pace_s = int(asked[1]), int(asked[2]) / 1000
        called, wanted = body.count(b'"role":"tool"'), int(asked[3] or 0)
        if called < wanted:
            tool = TOOL.search(body)
            assert tool, body[:200]
            numbers = range(called, min(called + CALLS_IN_TURN, wanted))
            calls = b",".join(CALL % (index, number, tool[1], number) for index, number in enumerate(numbers))
            self.transport.write(STREAM_HEAD + chunked(CALLS % calls) + b"0\r\n\r\n")
        elif not STREAMS.search(body):
            words = b"".join(b"%d " % time.monotonic_ns() for _ in range(self._words))
            whole = WHOLE % words
            self.transport.write(JSON_HEAD % len(whole) + whole)
        elif self._pace_s:
            self._loop = asyncio.get_running_loop()
            wait_s = int(asked[4] or 0) / 1000
            self._begun, self._said = self._loop.time() + wait_s, 0
            self._head = STREAM_HEAD
            if wait_s:
                self.transport.write(self._head)
                self._head = b""
            self._loop.call_at(self._begun, self._say)
        else:
            words = b"".join(CHUNK % time.monotonic_ns() for _ in range(self._words))
            self.transport.write(STREAM_HEAD + chunked(words + LAST) + b"0\r\n\r\n")

    def _say(self) -> None:
        if self.transport.is_closing():
            return
        self._said += 1
        head, self._head = self._head, b""
        if self._said > self._words:
            self.transport.write(head + chunked(LAST) + b"0\r\n\r\n")
            return
        self.transport.write(head + chunked(CHUNK % time.monotonic_ns()))
        # Paced by the clock, not by the last word: a late one does not delay the others.
        self._loop.call_at(self._begun + self._said * self._pace_s, self._say)


async def serve(port: int) -> None:
    """Until killed."""
    server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", port, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
