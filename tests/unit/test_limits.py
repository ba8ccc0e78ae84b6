"""How much one request may declare, and the path of what is too much."""

from typing import Any

import pytest

from app.domain.limits import check
from app.errors import InvalidParameter
from tests.unit.build import function, request

MOST = 4
NAMES = ["a"] * (MOST + 1)
FUNCTIONS = [function(f"f{number}") for number in range(MOST)]
ADDED = {"type": "additional_tools", "tools": [function("g")]}


def server(**fields: Any) -> dict[str, Any]:
    return {"type": "mcp", "server_label": "box", "server_url": "http://a.example", **fields}


def listed(count: int) -> dict[str, Any]:
    return {"type": "mcp_list_tools", "server_label": "box", "tools": [{"name": "t"}] * count}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [*FUNCTIONS, function("g")]}, "tools"),
        ({"tools": [{"type": "namespace", "name": "n", "tools": FUNCTIONS}, function("g")]}, "tools"),
        ({"tools": FUNCTIONS, "input": [ADDED]}, "input[0].tools"),
        ({"tools": [function("f"), server(allowed_tools=NAMES)]}, "tools[1].allowed_tools"),
        ({"tools": [server(allowed_tools={"tool_names": NAMES})]}, "tools[0].allowed_tools.tool_names"),
        (
            {"tools": [server(require_approval={"always": {"tool_names": NAMES}})]},
            "tools[0].require_approval.always.tool_names",
        ),
        (
            {"tools": [server(require_approval={"never": {"tool_names": NAMES}})]},
            "tools[0].require_approval.never.tool_names",
        ),
        ({"input": [listed(1), listed(MOST + 1)]}, "input[1].tools"),
    ],
)
def test_too_much_is_refused_with_its_path(body: dict[str, Any], param: str):
    with pytest.raises(InvalidParameter) as caught:
        check(request(**body), tools_max=MOST, names_max=MOST, listed_max=MOST)
    assert caught.value.param == param
    assert str(MOST) in caught.value.message


@pytest.mark.parametrize(
    "body",
    [
        {"tools": FUNCTIONS},
        {"tools": FUNCTIONS[1:], "input": [ADDED]},
        {"tools": [server(allowed_tools=NAMES[1:], require_approval={"never": {"tool_names": NAMES[1:]}})]},
        {"tools": [server(require_approval="never"), *FUNCTIONS[1:]]},
        {"input": [listed(MOST), listed(MOST)]},
    ],
)
def test_as_much_as_is_allowed_passes(body: dict[str, Any]):
    check(request(**body), tools_max=MOST, names_max=MOST, listed_max=MOST)
