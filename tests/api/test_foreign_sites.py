"""A server without keys answers its own machine only: no name that was rebound to it, no page of another site."""

import socket

import httpx
import pytest

from tests.servers import Served, reprise


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:1",
        "api.localhost:80",
        "127.0.0.1",
        "127.9.9.9:8000",
        "[::1]",
        "[::1]:8000",
        "localhost.",
    ],
)
def test_names_of_this_machine_are_answered(http, host):
    assert http.get("/responses", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "notlocalhost",
        "10.0.0.1",
        "[::2]",
        "localhost@evil.example",
        "localhost:80:evil.example",
        "",
    ],
)
def test_other_names_are_refused_before_anything_happens(http, host):
    refused(http.post("/responses", headers={"host": host}, json={"model": "m", "input": "hi"}), "own machine")


def refused(reply, message):
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (403, "foreign_site", None)
    assert error["type"] == "invalid_request_error"
    assert message in error["message"]


@pytest.mark.parametrize(
    "origin", ["http://localhost:3000", "http://127.0.0.1", "https://[::1]:8443", "tauri://localhost"]
)
def test_pages_of_this_machine_are_answered(http, origin):
    assert http.get("/responses", headers={"origin": origin}).status_code == 200


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost.evil.example", "http://10.0.0.1:80", ""]
)
def test_pages_of_other_sites_are_refused(http, origin):
    # As a page sends it without asking first: a simple request, whose type the server does not look at.
    body = b'{"model": "m", "input": "hi"}'
    refused(http.post("/responses", headers={"origin": origin, "content-type": "text/plain"}, content=body), "web page")


@pytest.mark.parametrize(("version", "status"), [(b"1.0", b"200"), (b"1.1", b"403")])
def test_a_request_without_a_host_is_answered_in_the_old_protocol_only(server, version, status):
    port = int(server.url.split(":")[2].split("/")[0])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as peer:
        peer.sendall(b"GET /v1/responses HTTP/%b\r\nconnection: close\r\n\r\n" % version)
        assert peer.recv(100).split()[1] == status


def test_with_keys_every_name_and_page_is_answered(base_env, new_database):
    env = {**base_env, "DATABASE_URL": new_database()}
    key = reprise(env, "keys", "create").stdout.strip()
    headers = {"authorization": f"Bearer {key}", "host": "api.example.com", "origin": "https://app.example.com"}
    with Served(env) as served:
        assert httpx.get(f"{served.url}/responses", headers=headers).status_code == 200
