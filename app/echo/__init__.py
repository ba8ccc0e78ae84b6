"""The built-in demo model: a small Chat Completions server on loopback, for when no upstream is configured.

It understands nothing. It repeats what it hears, remembers "my <thing> is <value>", calls a tool whose name it is told,
reads out what tools returned, and fills a JSON schema with something valid: enough to see streams, chains, tools and
structured output at work before there is a key for a real model. `server.serve()` starts it; `talk` and `instances` are
pure.
"""

from app.echo.server import EchoServer, serve

__all__ = ["EchoServer", "serve"]
