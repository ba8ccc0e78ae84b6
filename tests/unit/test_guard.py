"""The guard: which URLs may be called, however their authors disguise them."""

import asyncio
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

import httpx2
import pytest

from app.outbound.guard import Guard, OutboundRefused
from app.outbound.names import LOOKUPS_MAX, Names
from app.settings import Allowed, Settings, SettingsError, load, parse_allowed
from tests.toolserver import Toolserver


def guard(allow: str = "", **known: Sequence[str]) -> Guard:
    """A guard whose resolver knows these hosts, and literal addresses."""

    async def resolve(host: str, port: int, tenant: str) -> Sequence[str]:
        name = host.lower().rstrip(".")
        if name in known:
            return known[name]
        found = await asyncio.get_running_loop().getaddrinfo(host, port, flags=socket.AI_NUMERICHOST)
        return [str(address[0]) for *_, address in found]

    return Guard(parse_allowed(allow), resolve=resolve)


async def check(guard: Guard, given: str) -> None:
    """What a transport does before it connects."""
    url = httpx2.URL(given)
    guard.check_form(url)
    await guard.addresses(url.raw_host.decode(), url.port or 0, "t")


async def refused(url: str, allow: str = "", **known: Sequence[str]) -> str:
    """Why a URL is refused."""
    with pytest.raises(OutboundRefused) as caught:
        await check(guard(allow, **known), url)
    return str(caught.value)


PRIVATE = """
0.0.0.0 0.1.2.3 10.0.0.1 10.255.255.255 100.64.0.1 100.127.255.255 100.100.100.200 127.0.0.1 127.255.255.254 169.254.1.1
169.254.169.254 172.16.0.1 172.31.255.255 192.0.0.1 192.0.0.192 192.0.2.1 192.88.99.1 192.168.1.1 198.18.0.1 198.51.100.7
203.0.113.9 224.0.0.1 239.255.255.255 240.0.0.1 255.255.255.255 168.63.129.16
:: ::1 ::7f00:1 ::127.0.0.1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:a9fe:a9fe 64:ff9b::127.0.0.1 64:ff9b::a9fe:a9fe 64:ff9b:1::1
100::1 2001::1 2001:db8::1 2002:7f00:1:: 2002:0a00:0001::1 2002:a9fe:a9fe:: 3fff::1 5f00::1 fc00::1 fd00:ec2::254 fe80::1
fec0::1 ff02::1 ff0e::1
""".split()

PUBLIC = """
1.1.1.1 8.8.8.8 9.255.255.255 11.0.0.1 100.63.255.255 100.128.0.1 172.15.255.255 172.32.0.1 192.167.255.255 223.255.255.255
2606:4700:4700::1111 2a00:1450:4001::1 ::ffff:8.8.8.8 64:ff9b::8.8.8.8 2002:808:808::1
""".split()


@pytest.mark.parametrize("address", PRIVATE)
async def test_a_name_that_leads_to_such_an_address_is_refused(address: str):
    said = await refused("https://tools.example/mcp", **{"tools.example": [address]})
    assert "'tools.example'" in said and "REPRISE_OUTBOUND_ALLOW" in said
    assert address not in said


@pytest.mark.parametrize("address", PRIVATE)
async def test_such_an_address_itself_is_refused(address: str):
    await refused(f"http://[{address}]/" if ":" in address else f"http://{address}/")


@pytest.mark.parametrize("address", PUBLIC)
async def test_a_public_address_may_be_called(address: str):
    await check(guard(), f"https://[{address}]:8443/" if ":" in address else f"https://{address}:8443/")
    await check(guard(**{"tools.example": [address]}), "https://tools.example/")


@pytest.mark.parametrize(
    "url",
    [
        "http://2130706433/",
        "http://0x7f000001/",
        "http://0x7F.1/",
        "http://017700000001/",
        "http://0177.0.0.1/",
        "http://127.1/",
        "http://127.0.1/",
        "http://0/",
        "http://127.0.0.1./",
        "http://127.0.0.1:80/",
        "http://①②⑦.⓪.⓪.①/",
        "http://[::FFFF:7F00:1]/",
        "http://[0:0:0:0:0:ffff:127.0.0.1]/",
        "http://[fe80::1%25lo]/",
        "http://localhost/",
        "http://LOCALHOST/",
        "http://localhost./",
        "http://LocalHost.:8080/",
        "http://ip6-localhost/",
    ],
)
async def test_disguises_of_this_machine_are_refused(url: str):
    """With the system's resolver: an address in any form, and the name of this machine."""
    with pytest.raises((OutboundRefused, OSError, httpx2.InvalidURL)):
        await check(Guard(Allowed()), url)
    transport = Guard(Allowed()).transport("t")
    async with httpx2.AsyncClient(transport=transport, trust_env=False) as client:
        with pytest.raises((OutboundRefused, httpx2.ConnectError, httpx2.InvalidURL)):
            await client.get(url)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("ftp://8.8.8.8/", "only http and https"),
        ("file:///etc/passwd", "only http and https"),
        ("gopher://8.8.8.8/", "only http and https"),
        ("//8.8.8.8/", "only http and https"),
        ("8.8.8.8", "only http and https"),
        ("http://", "names no host"),
        ("http:///x", "names no host"),
        ("http://user@8.8.8.8/", "user name or password"),
        ("http://user:secret@8.8.8.8/", "user name or password"),
        ("http://8.8.8.8@127.0.0.1/", "user name or password"),
        ("http://8.8.8.8:99999999/", "port"),
        ("http://8.8.8.8:0/", "port"),
    ],
)
async def test_what_is_wrong_in_the_url_itself_is_refused(url: str, why: str):
    said = await refused(url)
    assert why in said
    assert "secret" not in said


async def test_one_private_address_among_public_ones_is_enough():
    await refused("http://mixed.example/", **{"mixed.example": ["8.8.8.8", "10.0.0.1"]})
    await check(guard(**{"mixed.example": ["8.8.8.8", "1.1.1.1"]}), "http://mixed.example/")


async def test_names_in_other_scripts_are_looked_up_as_they_travel():
    await refused("http://bücher.example/", **{"xn--bcher-kva.example": ["10.0.0.1"]})
    await check(guard("xn--bcher-kva.example", **{"xn--bcher-kva.example": ["10.0.0.1"]}), "http://BÜCHER.example/")


@pytest.mark.parametrize("allow", ["tools.internal", "TOOLS.Internal.", "10.1.0.0/16", "10.1.2.3", " x, 10.0.0.0/8 ,"])
async def test_what_the_operator_allows_may_be_called(allow: str):
    known = {"tools.internal": ["10.1.2.3"], "other.internal": ["10.1.2.3"]}
    await check(guard(allow, **known), "http://Tools.INTERNAL./")
    if "internal" in allow.lower():
        await refused("http://other.internal/", allow, **known)
    else:
        await check(guard(allow, **known), "http://other.internal/")


@pytest.mark.parametrize("address", ["::ffff:10.1.2.3", "64:ff9b::10.1.2.3", "2002:a01:203::1"])
async def test_an_allowed_address_is_allowed_in_every_form(address: str):
    await check(guard("10.1.0.0/16"), f"http://[{address}]/")
    await refused(f"http://[{address}]/", "10.2.0.0/16")


async def test_an_allowed_name_does_not_allow_its_neighbours():
    known = {"a.example": ["10.0.0.1"], "xa.example": ["10.0.0.1"], "b.a.example": ["10.0.0.1"]}
    await check(guard("a.example", **known), "http://a.example/")
    for name in ("xa.example", "b.a.example"):
        await refused(f"http://{name}/", "a.example", **known)


@pytest.mark.parametrize(
    "text", ["*", "*.internal", "10.0.0.1/8", "10.0.0.300", "a b", "http://x", "x:80", "-x", "::1/129"]
)
def test_a_bad_list_stops_the_start_with_one_line(text: str):
    with pytest.raises(SettingsError) as caught:
        load({"REPRISE_OUTBOUND_ALLOW": text})
    assert str(caught.value).startswith(f"REPRISE_OUTBOUND_ALLOW={text!r} is not valid: ")
    assert "\n" not in str(caught.value)


def test_the_settings_make_a_guard():
    assert parse_allowed(Settings().outbound_allow) == Allowed()
    assert isinstance(Guard.from_settings(Settings(outbound_allow="localhost, ::1, 10.0.0.0/8")), Guard)


class Rebinding:
    """A resolver whose answers change from one question to the next."""

    def __init__(self, *answers: str) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int, tenant: str) -> Sequence[str]:
        self.asked.append(host)
        return [self.answers.pop(0)]


async def test_the_connection_goes_to_the_address_that_was_looked_at(toolserver: Toolserver):
    """A name is resolved once for a connection: a second answer never counts. The Host header keeps the name."""
    resolver = Rebinding("127.0.0.1", "10.9.9.9")
    transport = Guard(parse_allowed("127.0.0.1"), resolve=resolver).transport("t")
    async with httpx2.AsyncClient(transport=transport, trust_env=False) as client:
        reply = await client.get(f"http://tools.example:{toolserver.port}/calls/rebinding")
    assert reply.status_code == 200
    assert resolver.asked == ["tools.example"]
    assert toolserver.asked("rebinding")[0].headers["host"] == f"tools.example:{toolserver.port}"


async def test_a_name_that_turns_private_is_refused_at_its_next_connection(toolserver: Toolserver):
    resolver = Rebinding("8.8.8.8", "127.0.0.1")
    rebound = Guard(Allowed(), resolve=resolver)
    url = f"http://tools.example:{toolserver.port}/calls/turned"
    await check(rebound, url)
    async with httpx2.AsyncClient(transport=rebound.transport("t"), trust_env=False) as client:
        with pytest.raises(OutboundRefused, match=r"tools\.example"):
            await client.get(url)
    assert toolserver.asked("turned") == []


async def test_every_redirect_is_looked_at(toolserver: Toolserver):
    """The first host may be called, the one it points to may not, and is not."""
    target = f"http://localhost:{toolserver.port}/calls/secret"
    transport = guard("127.0.0.1", localhost=["127.0.0.2"]).transport("t")
    async with httpx2.AsyncClient(transport=transport, trust_env=False, follow_redirects=True) as client:
        with pytest.raises(OutboundRefused, match="localhost"):
            await client.get(toolserver.url("mcp", "redirecting", redirect=target))
        with pytest.raises((OutboundRefused, httpx2.UnsupportedProtocol)):
            await client.get(toolserver.url("mcp", "redirecting", redirect="file:///etc/passwd"))
    assert toolserver.asked("secret") == []
    assert len(toolserver.asked("redirecting")) == 2


@pytest.mark.parametrize("form", ["http://user:secret@127.0.0.1:{}/calls/form", "http://127.0.0.1:0/calls/form"])
async def test_a_transport_looks_at_the_url_too(toolserver: Toolserver, form: str):
    async with httpx2.AsyncClient(transport=guard("127.0.0.1").transport("t"), trust_env=False) as client:
        with pytest.raises(OutboundRefused):
            await client.get(form.format(toolserver.port))
    assert toolserver.asked("form") == []


async def test_proxies_of_the_environment_are_not_asked(toolserver: Toolserver, monkeypatch: pytest.MonkeyPatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    async with httpx2.AsyncClient(transport=guard("127.0.0.1").transport("t"), trust_env=False) as client:
        assert (await client.get(toolserver.url("calls"))).status_code == 200


async def test_tls_asks_for_the_name_and_not_for_the_address(monkeypatch: pytest.MonkeyPatch):
    """The peer hears the name (SNI), although the connection was made to an address."""
    heard: asyncio.Queue[bytes] = asyncio.Queue()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.put_nowait(await reader.read(4096))
        writer.close()

    server = await asyncio.start_server(listen, "127.0.0.1")
    port = server.sockets[0].getsockname()[1]
    transport = guard("127.0.0.1", **{"tools.example": ["127.0.0.1"]}).transport("t")
    async with server, httpx2.AsyncClient(transport=transport, trust_env=False) as client:
        with pytest.raises(httpx2.ConnectError):
            await client.get(f"https://tools.example:{port}/")
        assert b"tools.example" in await heard.get()


async def test_an_address_that_does_not_answer_gives_way_to_the_next(toolserver: Toolserver):
    transport = guard("127.0.0.0/8", **{"two.example": ["127.0.0.9", "127.0.0.1"]}).transport("t")
    async with httpx2.AsyncClient(transport=transport, trust_env=False, timeout=5) as client:
        assert (await client.get(f"http://two.example:{toolserver.port}/calls")).status_code == 200


async def test_an_unknown_host_is_a_failed_connection():
    async def unknown(host: str, port: int, tenant: str) -> Sequence[str]:
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    transport = Guard(Allowed(), resolve=unknown).transport("t")
    async with httpx2.AsyncClient(transport=transport, trust_env=False) as client:
        with pytest.raises(httpx2.ConnectError):
            await client.get("http://nowhere.example/")


async def test_a_resolver_that_hangs_meets_the_deadline():
    async def hang(host: str, port: int, tenant: str) -> Sequence[str]:
        await asyncio.Event().wait()
        return []

    transport = Guard(Allowed(), resolve=hang).transport("t")
    async with httpx2.AsyncClient(transport=transport, trust_env=False, timeout=0.1) as client:
        with pytest.raises(httpx2.ConnectTimeout):
            await client.get("http://slow.example/")


async def test_names_that_never_resolve_hold_up_no_other_look_up(monkeypatch: pytest.MonkeyPatch):
    """Neither those of the process, which upstreams and databases need, nor another tenant's, also when they are given up."""
    answered = threading.Event()

    def ask_system(host: bytes | str, *given: Any, **more: Any) -> Any:
        if ".never" in str(host):
            answered.wait(60)
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return look_up(host, *given, **more)

    look_up = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", ask_system)
    names = Guard(parse_allowed("localhost"))
    transport = names.transport("hostile")
    try:
        async with httpx2.AsyncClient(transport=transport, trust_env=False, timeout=0.2) as client:
            asked = (client.get(f"http://{at}.never/") for at in range(LOOKUPS_MAX + 8))
            given_up = await asyncio.gather(*asked, return_exceptions=True)
        assert {type(error) for error in given_up} == {httpx2.ConnectTimeout}
        async with asyncio.timeout(30):
            assert await names.addresses("localhost", 80, "other")
            assert await asyncio.get_running_loop().getaddrinfo("localhost", 80)
    finally:
        answered.set()


async def test_a_look_up_that_can_not_begin_takes_no_place(monkeypatch: pytest.MonkeyPatch):
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    names = Names()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        for _ in range(LOOKUPS_MAX + 1):
            with pytest.raises(OSError, match="can't start new thread"):
                await names("localhost", 80, "tenant")
    async with asyncio.timeout(10):
        assert "127.0.0.1" in await names("localhost", 80, "tenant")


ENDING = """
import asyncio, socket, threading
from app.outbound.names import Names

async def give_up():
    try:
        await asyncio.wait_for(Names()("name.never", 80, "tenant"), 0.1)
    except TimeoutError:
        print("given up")

socket.getaddrinfo = lambda *given, **more: threading.Event().wait(600)
asyncio.run(give_up())
"""


def test_the_end_of_a_process_waits_for_no_look_up():
    ended = subprocess.run([sys.executable, "-c", ENDING], timeout=30, check=True, capture_output=True, text=True)
    assert (ended.stdout, ended.stderr) == ("given up\n", "")


def test_certificates_are_checked():
    tls = Guard(Allowed()).tls
    assert tls.verify_mode == ssl.CERT_REQUIRED
    assert tls.check_hostname
