"""Where a tool server listens: the option of its command line."""

import ipaddress
import os
from typing import Any, NamedTuple

import click

TOKEN_VARIABLE = "TOOLSERVER_TOKEN"  # noqa: S105 a variable's name


class Address(NamedTuple):
    """Where to listen, and the bearer token that clients must send; empty: none."""

    host: str
    port: int
    token: str


class _AddressType(click.ParamType[Address]):
    name = "address"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Address:
        """HOST:PORT, with the token of the environment. Without a token only loopback is allowed."""
        if isinstance(value, Address):
            return value
        host, _, port = value.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65535:
            self.fail("expected HOST:PORT, as in 127.0.0.1:8100.", param, ctx)
        host, token = host.strip("[]"), os.environ.get(TOKEN_VARIABLE, "")
        if not token and not is_loopback(host):
            raise click.ClickException(
                f"{host} can be reached from outside: set {TOKEN_VARIABLE}, which clients then send."
            )
        return Address(host, int(port), token)


http_option = click.option(
    "--http",
    "address",
    type=_AddressType(),
    metavar="HOST:PORT",
    help=f"Serve Streamable HTTP; ${TOKEN_VARIABLE}, if set, is demanded.",
)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
