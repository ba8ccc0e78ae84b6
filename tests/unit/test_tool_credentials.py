"""Which server a URL names, by the parser that also sends."""

import pytest

from app.errors import InvalidParameter
from app.outbound.credentials import server_of_url, unauthorized
from app.outbound.toolserver import ToolServer
from app.wire.tools import McpTool


def stored_under(url: str) -> str | None:
    """The name under which the credential of a declared server is looked for."""
    tool = McpTool(server_label="box", server_url=url)
    return unauthorized([tool], {"box": ToolServer("box", url=url)}).get("box")


@pytest.mark.parametrize(
    "url",
    [
        "https://tools.example/mcp",
        "HTTPS://TOOLS.example:443/mcp",
        "https://tools.example/x/../mcp",
        "https://tools.example/./mcp",
    ],
)
def test_spellings_of_one_address_are_one_server(url):
    assert server_of_url(url) == "https://tools.example/mcp"
    assert stored_under(f"{url}?toolsets=issues#x") == "https://tools.example/mcp"


@pytest.mark.parametrize(
    "url",
    [
        "http://tools.example/mcp",
        "https://tools.example/mcp/",
        "https://tools.example//mcp",
        "https://tools.example/%6dcp",
        "https://tools.example/MCP",
        "https://tools.example:8443/mcp",
        "https://tools.example./mcp",
        "https://tools.example.evil.example/mcp",
        "https://tools.example\\@evil.example/mcp",
        "https://tools.example@evil.example/mcp",
        "https://ada:pw@tools.example/mcp",
        "https://tools.example/mcp/..%2fother",
        "https://evil.example/?https://tools.example/mcp",
        "https://evil.example/#https://tools.example/mcp",
        "ftp://tools.example/mcp",
        "https:///mcp",
        "https://tools.example:0/mcp",
    ],
)
def test_another_address_is_another_server(url):
    assert stored_under(url) != "https://tools.example/mcp"


def test_an_international_name_is_that_on_the_wire():
    assert server_of_url("https://Exämple.com/ü") == "https://xn--exmple-cua.com/%C3%BC"


@pytest.mark.parametrize("url", ["", "x", "https://", "https://a/\x01"])
def test_what_is_no_url_is_refused(url):
    with pytest.raises(InvalidParameter) as refused:
        server_of_url(url)
    assert refused.value.param == "server_url"
