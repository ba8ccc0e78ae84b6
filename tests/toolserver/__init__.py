"""A scripted MCP server: over HTTP in a thread of its own, or as a program over standard input and output.

It is written by hand and not with an SDK, so that it can break every rule. The tool's name and its arguments
select what a call does (`tools.py`); the URL selects what the server as a whole does:

    toolserver.url("mcp", "weather", auth="secret")     Streamable HTTP, answers as SSE
    toolserver.url("json", "weather", pages=3)          Streamable HTTP, answers as JSON
    toolserver.url("sse", "weather")                    the older HTTP+SSE
    [sys.executable, "-m", "tests.toolserver"]          over standard input and output

The second word is a name of the test's choice, under which calls, requests and sessions are found again. Options:

    tools=echo,add      lists these only (all can be called)       pages=N         lists over N pages
    auth=TOKEN          401 without this bearer token              lies=1          lists tools with bad schemas and names
    status=N            this status for every POST                 loop=1          its list never ends
    endpoint=ORIGIN     HTTP+SSE: messages go elsewhere
    redirect=URL        307 to another place                       growing=1       every listing has one tool more
    silent=1            never answers the greeting                 packed=1        answers are compressed, unasked
    modern=1            knows no handshakes, nor sessions: 2026-07-28 and nothing else
    greeting=GATE       the greeting waits at this gate            listing=GATE    so does a list
    goodbye=GATE        the end of a session waits, too
    echo=1              gives headers back: `{plain:x-key}` in an answer is the header, as are the forms of `tools.echoed`

`python -m tests.toolserver --port N [--record FILE]` serves other processes (`Toolprocess` starts it); there `GET /calls` lists
the calls as JSON, `GET /sessions` the sessions, `GET /gates/<name>` whether a call has come to a gate, and
`POST /gates/<name>` opens it, `DELETE` shuts it again. FILE gets a line of JSON for each call as it arrives, over standard input and output too.
"""

from tests.toolserver.process import Toolprocess
from tests.toolserver.server import Toolserver
from tests.toolserver.tools import Call, Session

__all__ = ["Call", "Session", "Toolprocess", "Toolserver"]
