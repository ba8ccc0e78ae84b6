"""Settings: every one from its variable, every bad value one clear line that names it."""

from pathlib import Path
from typing import Any, get_args, get_origin

import msgspec
import pytest

from app.settings import PLAIN_NAMES, PROJECT, Settings, SettingsError, load, variable

FIELDS = {field.name: field for field in msgspec.structs.fields(Settings)}

GOOD: dict[str, tuple[str, Any]] = {
    "host": ("0.0.0.0", "0.0.0.0"),
    "port": ("0", 0),
    "reuse_port": ("true", True),
    "data_dir": ("/x", "/x"),
    "catalog": ("c.toml", "c.toml"),
    "database_url": ("postgresql://x", "postgresql://x"),
    "redis_url": ("redis://x", "redis://x"),
    "durable": ("false", False),
    "openai_base_url": ("http://x/v1", "http://x/v1"),
    "openai_api_key": ("sk", "sk"),
    "upstream_auth": ("caller", "caller"),
    "secret_key": ("AAAA", "AAAA"),
    "compaction_prompt": ("prompt.md", "prompt.md"),
    "reasoning_summary_prompt": ("prompt.md", "prompt.md"),
    "old_secret_keys": ("AAAA,BBBB", "AAAA,BBBB"),
    "on_disconnect": ("finish", "finish"),
    "log_level": ("debug", "debug"),
    "workers_in_api": ("false", False),
    "keepalive_events": ("true", True),
    "redis_prefix": ("mine", "mine"),
    "quota_outage": ("refuse", "refuse"),
    "outbound_allow": ("tools.internal,10.1.0.0/16", "tools.internal,10.1.0.0/16"),
    "proxies": ("10.0.0.1,2001:db8::/64", "10.0.0.1,2001:db8::/64"),
}
"""A value of each setting that is no plain limit: as it is written, as it is meant."""

UNITS = frozenset(
    "days agents pages bytes events headers items runs calls programs tools servers turns s attempts connections files chars size counts summaries tokens requests credentials".split()
)


def kind(name: str) -> type:
    """A setting's type, without its description."""
    annotated = FIELDS[name].type
    plain = get_args(annotated)[0]
    return str if get_origin(plain) is not None else plain


LIMITS = [name for name in FIELDS if kind(name) in {int, float} and name != "port"]


@pytest.mark.parametrize("name", FIELDS)
def test_a_setting_is_read_from_its_variable(name: str):
    written, meant = GOOD.get(name, ("1024", 1024))
    assert getattr(load({variable(name): written}), name) == meant


@pytest.mark.parametrize("name", FIELDS)
def test_an_empty_value_means_not_set(name: str):
    assert load({variable(name): ""}) == Settings()


def test_the_variables_are_the_names_in_capitals_but_for_those_that_everybody_knows():
    assert {variable(name) for name in FIELDS if not variable(name).startswith("REPRISE_")} == set(PLAIN_NAMES.values())
    assert variable("turns_max") == "REPRISE_TURNS_MAX"
    assert variable("database_url") == "DATABASE_URL"


@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_has_its_unit_in_its_name(name: str):
    assert UNITS & set(name.split("_")), f"{name} names no unit"
    assert (name.endswith("_s")) == (kind(name) is float), "seconds may be parts of one, nothing else may"


@pytest.mark.parametrize("name", [*LIMITS, "port"])
@pytest.mark.parametrize("value", ["many", "-1", "1_000", "1e400", "nan", "inf"])
def test_a_bad_number_is_refused_by_name(name: str, value: str):
    with pytest.raises(SettingsError) as caught:
        load({variable(name): value})
    assert str(caught.value).startswith(f"{variable(name)}='{value}' is not valid: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "65536"),
        ("port", "80.5"),
        ("durable", "perhaps"),
        ("upstream_auth", "anyone"),
        ("on_disconnect", "sometimes"),
        ("log_level", "loud"),
        ("turns_max", "0"),
        ("body_bytes_max", "1023"),
        ("keepalive_s", "0"),
        ("input_items_max", "1000000"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name: str, value: str):
    with pytest.raises(SettingsError, match=f"^{variable(name)}='{value}' is not valid: "):
        load({variable(name): value})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((text, True) for text in ("Yes", "on", "1", "y", "T", " true ")),
        *((text, False) for text in ("NO", "off", "False", "0", "N", "f")),
    ],
)
def test_a_switch_may_be_spelt_in_any_usual_way(text: str, value: bool):
    assert load({"REPRISE_DURABLE": text}).durable is value


@pytest.mark.parametrize(
    ("text", "level"),
    [("INFO", "info"), ("Warn", "warning"), ("ERROR", "error"), ("Critical", "critical"), ("FATAL", "critical")],
)
def test_a_choice_may_be_spelt_in_any_case(text: str, level: str):
    assert load({"REPRISE_LOG_LEVEL": text}).log_level == level


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("LOG_LEVEL", "debug, info, warning, error, critical"),
        ("ON_DISCONNECT", "cancel, finish"),
        ("DURABLE", "true or false"),
    ],
)
def test_a_choice_that_there_is_not_is_refused_with_those_that_there_are(name: str, known: str):
    with pytest.raises(SettingsError, match=rf"^REPRISE_{name}='loud' is not valid: .*; it may be {known}$"):
        load({f"REPRISE_{name}": "loud"})


def test_spaces_around_a_number_are_none_of_it():
    assert load({"REPRISE_PORT": " 8001 "}).port == 8001


@pytest.mark.timeout(20)
def test_a_list_of_hosts_is_read_in_linear_time():
    with pytest.raises(SettingsError, match="is neither a host name"):
        load({"REPRISE_OUTBOUND_ALLOW": "a" * 5_000 + "!"})
    assert load({"REPRISE_OUTBOUND_ALLOW": "_a-b.c,localhost"}).outbound_allow
    for bad in ("a..b", "-a", ".a"):
        with pytest.raises(SettingsError, match="is neither a host name"):
            load({"REPRISE_OUTBOUND_ALLOW": bad})


def test_an_unknown_name_is_refused_with_the_nearest_one():
    with pytest.raises(
        SettingsError, match=r"^REPRISE_TURN_MAX is not a setting of Reprise; did you mean REPRISE_TURNS_MAX\?$"
    ):
        load({"REPRISE_TURN_MAX": "3"})
    with pytest.raises(SettingsError, match=r"did you mean DATABASE_URL\?$"):
        load({"REPRISE_DATABASE_URL": "x"})
    with pytest.raises(SettingsError, match=r"^REPRISE_XYZZY is not a setting of Reprise\.$"):
        load({"REPRISE_XYZZY": "3"})


def test_other_variables_are_left_alone():
    assert load({"PATH": "/bin", "PORT": "1", "OPENAI_ORG": "x"}) == Settings()


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_says_what_it_is(name: str):
    described = get_args(FIELDS[name].type)[1]
    assert described.description and not described.description.endswith(".")


def test_the_data_directory_is_absolute():
    assert Settings(data_dir="x").data_path == Path("x").absolute()
    assert Settings(data_dir="~/x").data_path == Path("~/x").expanduser()


def test_the_default_data_directory_is_that_of_the_project_wherever_one_stands(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert Settings().data_path == PROJECT / ".data"
    assert Settings(data_dir="x").data_path == tmp_path / "x"
