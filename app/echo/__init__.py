"""The built-in demo model: a small Chat Completions server on loopback, for when no upstream is configured.

It understands nothing. It repeats the user's message, remembers "my <thing> is <value>", calls a tool whose name is
mentioned, quotes the results of tools, and fills a JSON schema with valid values: enough to try streams, chains, tools and
structured output without a key for a real model. `server.serve()` starts it; `replies` and `schema_examples` are pure.
"""

from app.echo.server import EchoServer, serve

__all__ = ["EchoServer", "serve"]
