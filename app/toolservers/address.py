"""Where a tool server listens: the option of its command line."""

import ipaddress

import click

TOKEN_VARIABLE = "TOOLSERVER_TOKEN"  # noqa: S105 the name of one, no token

http_option = click.option(
    "--http", "address", metavar="HOST:PORT", help=f"Serve Streamable HTTP; ${TOKEN_VARIABLE}, if set, is demanded."
)


def parsed(address: str) -> tuple[str, int]:
    """Host and port. Raises click.BadParameter."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise click.BadParameter("expected HOST:PORT, as in 127.0.0.1:8100.", param_hint="--http")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
