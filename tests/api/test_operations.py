"""What is not the API: the page at the root, and the probes."""

import httpx

from tests.waiting import fetch, until


def test_the_root_says_what_this_is_and_where_to_go(http):
    root = str(http.base_url).removesuffix("/v1/")
    reply = httpx.get(root)
    assert (reply.status_code, reply.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert all(word in reply.text for word in ("Responses API", "/v1", "/livez", "/readyz", "docs/"))
    assert httpx.get(root, headers={"host": "api.example.com"}).status_code == 200


def test_a_server_is_not_ready_while_postgres_is_read_only(new_server, servers):
    served = new_server()
    [[database]] = fetch(served.database_url, "select current_database()")
    until(lambda: status(served) == 200)
    fetch(served.database_url, f"alter database {database} set default_transaction_read_only = on")
    ended = "select pg_terminate_backend(pid) from pg_stat_activity where datname = $1 and pid <> pg_backend_pid()"
    fetch(served.database_url, ended, database)
    until(lambda: status(served) == 503)
    fetch(servers.database_url, f"alter database {database} reset default_transaction_read_only")
    until(lambda: status(served) == 200)


def test_a_server_is_not_ready_with_a_schema_that_is_older_or_gone(new_server):
    served = new_server()
    assert status(served) == 200
    fetch(served.database_url, "update alembic_version set version_num = '9999'")
    assert status(served) == 200, "a newer replica has migrated already"
    fetch(served.database_url, "update alembic_version set version_num = '0001'")
    assert status(served) == 503
    fetch(served.database_url, "drop table alembic_version")
    reply = httpx.get(f"{served.url.removesuffix('/v1')}/readyz")
    assert (reply.status_code, reply.json()["error"]["message"]) == (
        503,
        "The database's schema is older than this server.",
    )


def status(served):
    return httpx.get(f"{served.url.removesuffix('/v1')}/readyz").status_code
