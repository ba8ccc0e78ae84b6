"""The catalog: which file is taken, where a bad one is wrong, which way leads to a model."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from msgspec.structs import replace

from app.domain.dialect import HOSTED, PRESETS, Dialect
from app.errors import NotFound
from app.outbound.catalog import ENGINE_PARAMETERS, Catalog, Route
from app.outbound.catalog_file import load_catalog
from app.settings import Settings, SettingsError
from app.wire.run_limits import RunLimits

ONE = """
[upstreams.a]
base_url = "http://x/v1"
"""

TWO = """
[upstreams.local]
base_url = "http://127.0.0.1:8001/v1"

[upstreams.spare]
base_url = "http://127.0.0.1:8002/v1"
"""


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Catalog]:
    """Reads a catalog from its text."""

    def read(toml: str, environ: Mapping[str, str] | None = None) -> Catalog:
        path = tmp_path / "catalog.toml"
        path.write_text(toml)
        return load_catalog(Settings(catalog=str(path)), environ or {})

    return read


Read = Callable[..., Catalog]


# -- Without a file ---------------------------------------------------------------------------------------------------------


def test_without_a_file_there_is_the_upstream_of_the_environment():
    catalog = load_catalog(Settings(openai_base_url="http://x/v1", openai_api_key="sk"), {})
    assert catalog.routes("any@thing") == [Route("default", "any@thing")]
    (entry,) = catalog.upstreams.values()
    assert (entry.base_url, entry.key) == ("http://x/v1", "sk")


def test_with_nothing_configured_there_is_the_demo():
    catalog = load_catalog(Settings(), {}, demo_url="http://demo/v1")
    assert catalog.routes("any") == [Route("echo", "any")]
    assert catalog.upstreams["echo"].base_url == "http://demo/v1"


# -- Routes -----------------------------------------------------------------------------------------------------------------


def test_the_first_model_that_matches_counts(read: Read):
    catalog = read(
        TWO
        + """
[[models]]
name = "qwen-exact"
routes = [{ upstream = "spare", model = "q" }]

[[models]]
name = "qwen*"
routes = [{ upstream = "local" }, { upstream = "spare", model = "other" }]

[[models]]
name = "*"
routes = [{ upstream = "spare" }]
"""
    )
    assert catalog.routes("qwen-exact") == [Route("spare", "q")]
    assert catalog.routes("qwen3") == [Route("local", "qwen3"), Route("spare", "other")]
    assert catalog.routes("llama") == [Route("spare", "llama")]
    assert catalog.model_names == ["qwen-exact"]


def test_patterns_see_the_case(read: Read):
    catalog = read(TWO + '[[models]]\nname = "Qwen*"\nroutes = [{ upstream = "local" }]\n')
    assert catalog.routes("Qwen3") == [Route("local", "Qwen3")]
    with pytest.raises(NotFound):
        catalog.routes("qwen3")


def test_an_entry_may_be_for_an_upstream_that_is_named_directly(read: Read):
    routes = 'routes = [{ upstream = "local" }, { upstream = "spare" }, { upstream = "spare", model = "q" }]'
    catalog = read(f'{TWO}[[models]]\nname = "local@*"\n{routes}\n[[models]]\nname = "*"\n{routes}')
    own = [Route("local", "qwen3"), Route("spare", "qwen3"), Route("spare", "q")]
    assert catalog.routes("local@qwen3") == catalog.routes("qwen3") == own
    assert catalog.routes("spare@qwen3") == [Route("local", "spare@qwen3"), *own[1:]]
    assert catalog.routes("nowhere@qwen3")[0] == Route("local", "nowhere@qwen3")


def test_an_upstream_can_be_named_directly(read: Read):
    catalog = read(TWO)
    assert catalog.routes("spare@qwen3@q4") == [Route("spare", "qwen3@q4")]
    with pytest.raises(NotFound, match="nowhere@qwen3"):
        catalog.routes("nowhere@qwen3")


def test_other_models_go_to_the_default_or_to_the_only_upstream(read: Read):
    assert read('default = "spare"\n' + TWO).routes("any") == [Route("spare", "any")]
    assert read('[upstreams.only]\nbase_url = "http://x/v1"\n').routes("any") == [Route("only", "any")]
    with pytest.raises(NotFound, match="any") as caught:
        read(TWO).routes("any")
    assert caught.value.status == 404


# -- Upstreams --------------------------------------------------------------------------------------------------------------


def test_an_upstream_has_its_key_from_the_environment(read: Read):
    toml = '[upstreams.a]\nbase_url = "http://x/v1"\nkey_env = "A_KEY"\n'
    assert read(toml, {"A_KEY": "sk"}).upstreams["a"].key == "sk"
    with pytest.raises(SettingsError, match="upstream 'a' needs the environment variable A_KEY"):
        read(toml)


def test_an_upstream_says_everything_about_itself(read: Read):
    catalog = read(
        """
[upstreams.a]
base_url = "http://x/v1"
key = "sk"
headers = { x-team = "one" }
dialect = { lacks = ["json_object", "strict"], reasoning = "reasoning", think = "thinking", developer_role = true }
pass = ["house_rule"]
connect_timeout_s = 1
answer_timeout_s = 2.5
idle_timeout_s = 3
attempts_max = 1
"""
    )
    entry = catalog.upstreams["a"]
    assert entry.speaks == Dialect(
        lacks=frozenset({"json_object", "strict"}), reasoning="reasoning", think="thinking", developer_role=True
    )
    assert (entry.headers, entry.takes("house_rule"), entry.takes("x")) == ({"x-team": "one"}, True, False)
    assert (entry.connect_timeout_s, entry.answer_timeout_s, entry.idle_timeout_s) == (1, 2.5, 3)
    assert entry.attempts_max == 1


def test_the_dialect_of_the_hosted_api_is_known_by_its_host(read: Read):
    toml = '[upstreams.a]\nbase_url = "{}"\n'
    assert read(toml.format("https://api.openai.com/v1")).upstreams["a"].speaks is HOSTED
    assert read(toml.format("https://api.openai.com.example/v1")).upstreams["a"].speaks == Dialect()
    assert read(toml.format("https://api.openai.com/v1") + "dialect = {}\n").upstreams["a"].speaks == Dialect()


def test_a_dialect_is_named_by_a_preset_which_a_table_may_change(read: Read):
    toml = '[upstreams.a]\nbase_url = "http://127.0.0.1:1/v1"\n'
    assert read(toml + 'dialect = "mistral"\n').upstreams["a"].speaks is PRESETS["mistral"]
    changed = read(toml + 'dialect = { preset = "vllm", lacks = ["json_schema"] }\n').upstreams["a"].speaks
    assert changed == replace(PRESETS["vllm"], lacks=frozenset({"json_schema"}))
    added = read(toml + 'dialect = { preset = "llama.cpp", lacks = ["repeated_roles"] }\n').upstreams["a"].speaks
    assert added.lacks == {"tool_choice_named", "repeated_roles"}
    for wrong in ('"vlm"', '{ preset = "vlm" }', "{ preset = 1 }"):
        with pytest.raises(SettingsError, match=r"upstreams\.a.* it may be .*vllm"):
            read(toml + f"dialect = {wrong}\n")


def test_parameters_are_let_through_that_any_upstream_takes(read: Read):
    assert read(TWO).passed_on == ENGINE_PARAMETERS
    narrow = TWO.replace('8001/v1"', '8001/v1"\npass = ["a"]').replace('8002/v1"', '8002/v1"\npass = ["b"]')
    assert read(narrow).passed_on == {*ENGINE_PARAMETERS, "a", "b"}


# -- Bad files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ("upstreams =", r"catalog\.toml: "),
        ("", "upstreams"),
        ("[upstreams]\n", "upstreams"),
        ("[upstreams.a]\n", "base_url"),
        ('[upstreams.a]\nbase_url = "127.0.0.1:8000"\n', "base_url"),
        (ONE + 'base_uri = "y"\n', "base_uri"),
        (ONE + "idle_timeout_s = 0\n", "idle_timeout_s"),
        (ONE + "attempts_max = 0\n", "attempts_max"),
        (ONE + 'dialect = { lacks = ["sense"] }\n', "sense"),
        (ONE + 'dialect = { speaks = "x" }\n', "speaks"),
        ('defaults = "a"\n' + ONE, "defaults"),
        ('default = "b"\n' + ONE, "'default' names an unknown upstream 'b'"),
        (TWO + '[[models]]\nname = "m"\nroutes = []\n', "routes"),
        (TWO + '[[models]]\nname = "m"\nroutes = [{ upstream = "c" }]\n', "model 'm' names an unknown upstream 'c'"),
        (
            TWO + '[[models]]\nname = "m"\nroutes = [{ upstream = "spare" }]\nreasoning_summary = { model = "n" }\n',
            "model 'm': 'reasoning_summary': The model 'n' does not exist",
        ),
        (
            TWO + '[[models]]\nname = "m"\nroutes = [{ upstream = "spare" }]\nreasoning_summary = "of"\n',
            "Invalid enum value 'of'.*it may be off, verbatim",
        ),
        (ONE + "prices = { input = 1 }\n", "missing required field `output`"),
        (ONE + "prices = { input = 1, output = -1 }\n", r"\[upstreams.a\]: 'prices.output' is no number"),
        (
            TWO + '[[models]]\nname = "m"\nroutes = [{ upstream = "spare", prices = { input = nan, output = 1 } }]\n',
            r"model 'm': 'routes\[0\]\.prices\.input' is no number",
        ),
        (
            TWO + '[[models]]\nname = "m"\nroutes = [{ upstream = "spare" }]\nprices = { input = 1, output = inf }\n',
            r"model 'm': 'prices\.output' is no number",
        ),
        ('currency = "U$D"\n' + ONE, "currency"),
    ],
)
def test_a_bad_catalog_is_refused_with_the_place(read: Read, toml: str, said: str):
    with pytest.raises(SettingsError, match=said) as caught:
        read(toml)
    assert "catalog.toml" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing.toml", "."])
def test_a_file_that_can_t_be_read_is_named(tmp_path: Path, name: str):
    with pytest.raises(SettingsError, match=r"^REPRISE_CATALOG='.*' can't be read: "):
        load_catalog(Settings(catalog=str(tmp_path / name)), {})


def test_an_address_without_a_scheme_is_refused():
    with pytest.raises(SettingsError, match=r"^OPENAI_BASE_URL is no"):
        load_catalog(Settings(openai_base_url="127.0.0.1:8000"), {})


def test_a_file_that_is_no_text_is_named(tmp_path: Path):
    path = tmp_path / "catalog.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match=r"catalog\.toml: "):
        load_catalog(Settings(catalog=str(path)), {})


# -- Faults -----------------------------------------------------------------------------------------------------------------

UNPRICED = """
[[models]]
name = "[m]*"
routes = [{ upstream = "local", prices = { input = 1, output = 1 } }, { upstream = "spare" }]
"""

LIMITED_PROMPT = """
[prompts.p.versions.1]
model = "m"
instructions = "x"
run_limits = { cost = 1 }
"""

SERVER = '[tool_servers.s]\nurl = "http://x/mcp"\n'


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ('[upstreams.near]\nbase_url = "x"', r"\[upstreams\.near\]: .*base_url"),
        (
            ONE + 'dialect = { lacks = ["everything"] }',
            r"\[upstreams\.a\]: .*'everything'.*; it may be audio, .*strict",
        ),
        (
            ONE + 'dialect = { count_tokens = ["tokenise"] }',
            r"\[upstreams\.a\]: .*'tokenise'.*; it may be apply_template, input_tokens, tokenize, usage",
        ),
        (ONE + 'dialect = { reasoning = "loud" }', "it may be none, parts, reasoning, reasoning_content, same, think"),
        (ONE + "atempts_max = 3", r"\[upstreams\.a\]: .*`atempts_max`.*did you mean `attempts_max`"),
        (ONE + '[[models]]\nname = "m"\nroute = []', r"\[\[models\]\] 'm': .*`route`.*did you mean `routes`"),
        (ONE + "[[models]]\nroutes = []", r"\[\[models\]\] number 1: "),
        (ONE + '[hosted.web_search]\nserver = "s"\ntol = "t"', r"\[hosted\.web_search\]: .*`tol`.*did you mean `tool`"),
        (
            ONE + SERVER + '[hosted.web_search]\nserver = "s"\ntool = "t"\narguments = { q = "$qeury" }',
            r"hosted 'web_search': there is no '\$qeury'; there are \$allowed_callers.*\$query",
        ),
        (ONE + SERVER + '[hosted.shell]\nserver = "t"\ntool = "t"', "unknown tool server 't'; there are s"),
        (ONE + 'headers = { "x team" = "a" }', r"\[upstreams\.a\]: 'x team' is no name of a header"),
        (ONE + 'headers = { x = "a\\nb" }', r"\[upstreams\.a\]: the value of header 'x' holds characters"),
        (ONE + 'headers = { x = "Grün" }', r"\[upstreams\.a\]: the value of header 'x' holds characters"),
        (
            TWO + '[[models]]\nname = "q*"\nroutes = [{ upstream = "up" }]',
            "unknown upstream 'up'; there are local, spare",
        ),
        (
            ONE
            + '[[models]]\nname = "q*"\nroutes = [{ upstream = "a" }]\n[[models]]\nname = "q3"\nroutes = [{ upstream = "a" }]',
            r"model 'q3' is never reached: 'q\*' stands before it and matches",
        ),
        (
            ONE + '[hosted.web_serch]\nserver = "s"\ntool = "t"',
            r"\[hosted\.web_serch\]: there is no such tool; it may be code_interpreter, .*did you mean `web_search`\?",
        ),
        (ONE + '[hosted.web_search_preview]\nserver = "s"\ntool = "t"', "did you mean `web_search`"),
        (ONE + "idle_timeout_s = inf", r"\[upstreams\.a\]: .*idle_timeout_s"),
        (ONE + 'key = "${KEY}"', r"\[upstreams\.a\]: \$\{…\} is not filled in; 'key_env'"),
        (ONE + 'headers = { x = "Bearer ${A:-${B}}" }', r"\[upstreams\.a\]: \$\{…\} is not filled in"),
        (ONE + SERVER + 'authorization = "${KEY}"', r"\[tool_servers\.s\]: .*'authorization_env'"),
        *(
            (ONE + f'headers = {{ {name} = "1" }}', rf"\[upstreams\.a\]: header '{name}' is the connection's own")
            for name in ("Content-Length", "host", "transfer-encoding", "Connection")
        ),
        (ONE + '[[models]]\nname = ""\nroutes = [{ upstream = "a" }]', r"\[\[models\]\] '': .*length >= 1.*name"),
        (ONE + 'dialect = { developer_role = "perhaps" }', r"\[upstreams\.a\]: Expected `bool \| null`, got `str`"),
        *(
            (
                ONE + SERVER + f'[hosted.web_search]\nserver = "s"\ntool = "t"\narguments = {{ q = {value} }}',
                "hosted 'web_search': .* is not filled in: a placeholder is a whole argument",
            )
            for value in ('{ x = "$qury" }', '{ x = ["$query"] }', '"find $query"', '"find ${query}"')
        ),
        (
            ONE + SERVER + '[hosted.web_search]\nserver = "s"\ntool = "t"\narguments = { q = "${${query}}" }',
            r"there is no '\$\{\$\{query\}\}'; there are \$",
        ),
        (
            ONE + SERVER + '[hosted.web_search]\nserver = "s"\ntool = "t"\nfields = { ur = "link" }',
            "hosted 'web_search': there is no field 'ur'; there are url, title, text",
        ),
        *(
            (ONE + f"[prompts.p.versions.{version}\n{fields}", message)
            for version, fields, message in (
                (
                    "1]",
                    'instructions = "Hi {{you}}"',
                    r"\[prompts\.p\.versions\.1\]: '\{\{you\}\}' in 'instructions' is not among",
                ),
                ("1]", 'instructions = "x"\nvariables = { you = "string" }', "the variable 'you' stands nowhere in"),
                (
                    "1]",
                    'instructions = "{{a}}"\nvariables = { a = "text" }',
                    r"\[prompts\.p\.versions\.1\]: .*; it may be input_file,",
                ),
                (
                    "1]",
                    'instructions = "{{a}}"\nvariables = { a = "input_file" }',
                    "'a' is no text, so .* the role 'developer'",
                ),
                ("1]", 'instructions = "x"\ntemperatur = 1.0', "did you mean `temperature`"),
                ("1]", 'instructions = "x"\ntemperature = 3.0', r"\[prompts\.p\.versions\.1\]: .*temperature"),
                (
                    "1]",
                    'instructions = "x"\ntools = [{ type = "functoin" }]',
                    r"\[prompts\.p\.versions\.1\]: .*tools\[0\]\.type",
                ),
                ("1]", 'instructions = "x"\ntool_choice = "some"', r"\[prompts\.p\.versions\.1\]: .*'tool_choice'"),
                (
                    "1]",
                    'instructions = "x"\nreasoning = { mode = "pro" }',
                    r"\[prompts\.p\.versions\.1\]: .*'reasoning\.mode'",
                ),
                ("1]", 'model = "x"', r"\[prompts\.p\.versions\.1\]: .*`instructions`"),
                ("one]", 'instructions = "x"', "versions"),
                ("1]", 'instructions = "x"\n[prompts.p]\ndefault = "2"', "an unknown version '2'; there are 1"),
                (
                    "1]",
                    'instructions = [{ role = "tool", content = "x" }]',
                    "it may be assistant, developer, system, user",
                ),
            )
        ),
        (
            TWO + '[prompts.p.versions.1]\nmodel = "q"\ninstructions = "x"',
            r"\[prompts\.p\.versions\.1\]: The model 'q' does not exist",
        ),
        *(
            (ONE + f"[agents.{name}]\n{fields}", message)
            for name, fields, message in (
                ("g", 'instructions = "x"', r"\[agents\.g\]: .*`model`"),
                ("g", 'model = "m"\ninstruction = "x"', r"\[agents\.g\]: .*did you mean `instructions`"),
                (
                    "g",
                    'model = "m"\ninstructions = "{{a}}"',
                    r"\[agents\.g\]: .*'\{\{a\}\}' in 'instructions' is not among",
                ),
                (
                    "g",
                    'model = "m"\ntools = [{ type = "web_search" }]',
                    r"\[agents\.g\]: tools\[0\]\.type: .*has no \[hosted\.web_search\]",
                ),
                (
                    "g",
                    'model = "m"\ntools = [{ type = "function", name = "f" }, { type = "programmatic_tool_calling" }]',
                    r"\[agents\.g\]: tools\[1\]\.type: Tools of type 'programmatic_tool_calling' are not supported",
                ),
                (
                    "g",
                    'model = "m"\ntools = [{ type = "function", name = "f" }, { type = "function", name = "f" }]',
                    r"\[agents\.g\]: tools: Duplicate tool name 'f'",
                ),
                (
                    "g",
                    'model = "m"\ntools = [{ type = "mcp", server_label = "s" }]',
                    r"\[agents\.g\]: 'tools\[0\]\.server_url' is missing, and this server has no tool server 's'",
                ),
                (
                    "g",
                    (
                        'model = "m"\ntools = [{ type = "mcp", server_label = "s" }]\n'
                        '[tool_servers.s]\nurl = "https://tools.example"\n[hosted.web_search]\nserver = "s"\ntool = "search"'
                    ),
                    r"\[agents\.g\]: .*no tool server 's' that requests may name",
                ),
                ("g", 'model = "m"\ntemperature = 3.0', r"\[agents\.g\]: .*temperature"),
                ("g", 'model = "m"\noverrides = ["temperatur"]', r"\[agents\.g\]: .*Did you mean 'temperature'"),
                ("g", 'model = "g"', r"\[agents\.g\]: 'g' is an agent; the model of an agent can't be one"),
                ("'a b'", 'model = "m"', r"\[agents\.'a b'\]: a name has 1 to 64 letters"),
                (
                    "g",
                    'model = "m"\n[[models]]\nname = "g"\nroutes = [{ upstream = "a" }]',
                    r"\[agents\.g\]: a model of \[\[models\]\] has this name",
                ),
                (
                    "g",
                    'model = "m"\n[prompts.p.versions.1]\nmodel = "g"\ninstructions = "x"',
                    r"\[prompts\.p\.versions\.1\]: 'model' names the agent 'g', whose 'overrides'",
                ),
            )
        ),
        (TWO + '[agents.g]\nmodel = "q"', r"\[agents\.g\]: The model 'q' does not exist"),
        *(
            (TWO + UNPRICED + fields, message)
            for fields, message in (
                ("run_limits = { cost = 0.5 }", r"model '\[m\]\*': 'run_limits\.cost' .* 'routes\[1\]' has none"),
                (
                    'prices = { input = 1, output = 1 }\nreasoning_summary = { model = "spare@x" }\nrun_limits = { cost = 1 }',
                    r"model '\[m\]\*': 'run_limits\.cost' .* the model of 'reasoning_summary' has none",
                ),
                ("run_limits = { cost = 1e-13 }", r"\[\[models\]\] '\[m\]\*': .*>= 1e-12 - at `\$\.run_limits\.cost`"),
                ('[agents.g]\nmodel = "m"\nrun_limits = { cost = 1 }', r"\[agents\.g\]: 'run_limits\.cost' "),
                ('[agents.g]\nmodel = "m"\nrun_limits = { cost = 1e-13 }', r"\[agents\.g\]: .*`\$\.run_limits\.cost`"),
                (
                    LIMITED_PROMPT,
                    r"\[prompts\.p\.versions\.1\]: 'run_limits\.cost' ",
                ),
                (
                    '[agents.g]\nmodel = "m"\noverrides = "all"' + LIMITED_PROMPT.replace('"m"', '"g"'),
                    r"\[prompts\.p\.versions\.1\]: 'run_limits\.cost' ",
                ),
            )
        ),
        ('[upstreams."a@b"]\nbase_url = "http://x/v1"', "neither spaces nor '@'"),
        (ONE + '[tool_servers."a b"]\nurl = "http://x"', "letters, digits, '_' and '-'"),
    ],
)
def test_a_fault_names_its_entry_and_what_may_stand_there(read: Read, toml: str, message: str):
    with pytest.raises(SettingsError, match=rf"^[^\n]*catalog\.toml: [^\n]*{message}[^\n]*$"):
        read(toml)


@pytest.mark.parametrize("of", ["the route", "the model", "the upstream"])
def test_a_limit_of_cost_stands_where_every_route_has_prices(read: Read, of: str):
    prices = "prices = { input = 1, output = 1 }\n"
    toml = TWO + (prices if of == "the upstream" else "") + UNPRICED + (prices if of == "the model" else "")
    if of == "the route":
        toml = toml.replace('"spare" }', '"spare", ' + prices.strip() + " }")
    limits = "run_limits = { cost = 1e-12 }\n"
    prompt = '[prompts.p.versions.1]\nmodel = "m"\ninstructions = "x"\n' + limits
    catalog = read(toml + limits + '[agents.g]\nmodel = "m"\n' + limits + prompt)
    assert catalog.run_limits("m") == catalog.agents["g"].run_limits == RunLimits(cost=1e-12)
    anyone = read(TWO + prompt.replace('model = "m"\n', ""))
    assert anyone.prompts["p"].versions["1"].run_limits == RunLimits(cost=1e-12), "its model is each request's"


@pytest.mark.parametrize("written", ['"yes"', '"T"', "1", '"On"', "true"])
def test_a_switch_may_be_spelt_in_any_usual_way(read: Read, written: str):
    catalog = read(f"refuse_missing_tools = {written}\n" + ONE + f"dialect = {{ developer_role = {written} }}")
    assert (catalog.refuse_missing_tools, catalog.upstreams["a"].speaks.developer_role) == (True, True)


def test_a_preset_may_be_spelt_in_any_case(read: Read):
    assert read(ONE + 'dialect = "vLLM"').upstreams["a"].speaks is PRESETS["vllm"]


def test_a_file_may_begin_with_a_byte_order_mark(read: Read):
    assert set(read("\ufeff" + ONE).upstreams) == {"a"}


def test_a_dollar_that_begins_no_placeholder_is_a_dollar(read: Read):
    hosted = '[hosted.web_search]\nserver = "s"\ntool = "t"\narguments = { q = "$query", note = "below 5$, not $$" }'
    assert read(ONE + SERVER + hosted).hosted["web_search"].arguments["note"] == "below 5$, not $$"


# -- Issuers ----------------------------------------------------------------------------------------------------------------

ISSUER = """
[issuers.company]
issuer = "https://i"
audience = "a"
algorithms = ["RS256"]
tenant = "t"
"""


def test_an_issuer_has_its_secret_from_the_environment_and_its_file_beside_the_catalog(read: Read, tmp_path: Path):
    secret = ISSUER.replace("RS256", "HS256") + 'secret_env = "S"\n'
    assert read(ONE + secret, {"S": "x" * 32}).issuers["company"].secret == "x" * 32
    (tmp_path / "keys.json").write_text("{}")
    by_file = ISSUER.replace("tenant =", 'claims = { tenant = "c" }\ntenants = ["x"]\ncreates_tenants = "yes"\n#')
    issuer = read(f'{ONE}{by_file}jwks_file = "keys.json"\n').issuers["company"]
    assert (issuer.jwks_file, issuer.creates_tenants) == (str(tmp_path / "keys.json"), True)
    for toml, message in (
        (secret, "issuer 'company' needs the environment variable S"),
        (ISSUER + 'jwks_file = "none.json"\n', r"\[issuers\.company\]: there is no file .*none\.json"),
    ):
        with pytest.raises(SettingsError, match=message):
            read(ONE + toml)
    with pytest.raises(SettingsError, match=r"\[issuers\.company\]: the secret of HS256 needs at least 32") as caught:
        read(ONE + secret, {"S": "short-s3cret"})
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        (ISSUER.replace("RS256", "none"), r"\[issuers\.company\]: .*'none'.*; it may be .*ES256"),
        (ISSUER + 'claim = { user = "sub" }', r"\[issuers\.company\]: .*did you mean `claims`"),
        (ISSUER + 'tenants = ["x"]', r"\[issuers\.company\]: 'tenants' and 'creates_tenants' need"),
        (ISSUER.replace("https", "http"), r"\[issuers\.company\]: keys are fetched by https"),
        (ISSUER + 'jwks_url = "http://k/keys"', r"\[issuers\.company\]: keys are fetched by https"),
        (ISSUER + ISSUER.replace("company", "other"), r"\[issuers\.other\]: \[issuers\.company\] has the same issuer"),
        (ISSUER.replace("company", '"a b"'), r"\[issuers\.'a b'\]: a name has"),
    ],
)
def test_an_issuer_that_can_not_be_is_refused(read: Read, toml: str, message: str):
    assert read(ONE + ISSUER).issuers.keys() == {"company"}
    with pytest.raises(SettingsError, match=message):
        read(ONE + toml)
