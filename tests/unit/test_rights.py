"""What a key may use, and whose data it sees."""

import pytest

from app.domain import rights
from app.domain.rights import Rights


@pytest.mark.parametrize(
    ("pattern", "names", "others"),
    [
        ("qwen3", ["qwen3"], ["qwen3-8b", "Qwen3", "local@qwen3", ""]),
        ("qwen*", ["qwen", "qwen3"], ["qwe", "my-qwen"]),
        ("*", ["", "any/thing", "a\nb"], []),
        ("a*a", ["aa", "aba"], ["a", "ab"]),
        ("a*b*c", ["abc", "axbxc", "abbc", "abcc"], ["ac", "acb", "bc"]),
        ("*b*b*", ["bb", "abab"], ["b", "ab"]),
        ("a**c", ["ac", "abc"], ["a", "c"]),
        ("q?[1]", ["q?[1]"], ["qa1"]),
    ],
)
def test_a_pattern_is_a_name_with_stars(pattern, names, others):
    key = Rights("t", models=("x", pattern))
    assert [name for name in names if not key.may_use(name)] == []
    assert [name for name in others if key.may_use(name)] == []


def test_without_names_every_model_may_be_used():
    assert Rights("t").may_use("any")


def test_a_user_s_owner_is_that_of_no_tenant():
    owner = Rights("t", "u").owner
    assert (rights.tenant_of(owner), rights.logged(owner)) == ("t", {"tenant_id": "t", "user": "u"})
    assert Rights("t").owner == rights.tenant_of("t") == "t"
    assert not rights.is_name(owner)
    assert rights.owner_of("tu", "") != owner != rights.owner_of("t", "v")
