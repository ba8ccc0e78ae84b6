"""A tool server for `code_interpreter`: runs Python without a network and within limits.

    python -m app.toolservers.sandbox [--http HOST:PORT] [--python /opt/science/bin/python]

Each run has its own Linux namespaces (`isolation.py`): code can't reach the network, see the host's files or processes, or leave a
process running. CPU and wall time, memory, processes, files and output are limited. That is the isolation of a container, not of a
virtual machine: code shares the kernel with the host, though system calls that it does not need are refused (`seccomp.py`). For
untrusted users run this server on a machine, or in a virtual machine, that holds nothing of value.

Where namespaces are not available (as in a Docker container with the default profile) the server does not start. With
`--allow-network` it does, and code can reach the network. Then runs have namespaces where these are available; elsewhere they have
resource limits only, and code can read what this server's user can read.

A container keeps its files between calls, for `--idle` seconds after its last use. There are at most `--containers` of them, with
`--all-disk` MiB in all; beyond that the least recently used one that is not in use is removed. Several servers may share a
`--directory`. A container's id is its only protection, so ids must be unguessable. Each call has a new interpreter: variables are lost.
"""

import asyncio
import os
import shutil
import sys
import tempfile
from pathlib import Path

import click

from app.toolservers.address import Address, http_option
from app.toolservers.code_runs import CodeRunner
from app.toolservers.containers import Containers
from app.toolservers.isolated_python import MIB, IsolatedPython, IsolationError, Limits


@click.command()
@http_option
@click.option("--python", default=sys.executable, show_default=True, help="The interpreter that runs the code.")
@click.option(
    "--directory", type=click.Path(path_type=Path, readable=False), help="Where containers are stored; must be private."
)
@click.option("--idle", default=1200.0, show_default=True, help="Seconds until an unused container is removed.")
@click.option("--runs", default=os.cpu_count() or 1, show_default=True, help="Runs at once; others wait.")
@click.option("--wall", default=Limits.wall_s, show_default=True, help="Seconds that a run may last.")
@click.option("--cpu", default=Limits.cpu_s, show_default=True, help="Seconds of CPU time of each process.")
@click.option("--memory", default=Limits.memory_bytes // MIB, show_default=True, help="MiB of memory of a run.")
@click.option("--disk", default=Limits.disk_bytes // MIB, show_default=True, help="MiB of all files of a container.")
@click.option("--containers", default=1000, show_default=True, help="Containers; the oldest idle one is replaced.")
@click.option("--all-disk", default=10 * 1024, show_default=True, help="MiB of all files of all containers; likewise.")
@click.option("--processes", default=Limits.processes, show_default=True, help="Processes and threads of a run.")
@click.option(
    "--allow-network", is_flag=True, help="Let code reach the network, and run it even where only limits confine it."
)
def main(
    address: Address | None,
    python: str,
    directory: Path | None,
    idle: float,
    runs: int,
    wall: float,
    cpu: int,
    memory: int,
    disk: int,
    containers: int,
    all_disk: int,
    processes: int,
    allow_network: bool,
) -> None:
    """Serve the tool run_python over MCP, on stdio or HTTP."""
    if all_disk < disk:
        raise click.UsageError("--all-disk must be as much as --disk at least.")
    limits = Limits(wall_s=wall, cpu_s=cpu, memory_bytes=memory * MIB, disk_bytes=disk * MIB, processes=processes)
    private = private_directory(directory or Path(tempfile.gettempdir(), f"reprise-sandbox-{os.getuid()}"))
    isolated = IsolatedPython(Path(shutil.which(python) or python), limits, private, allow_network=allow_network)
    try:
        asyncio.run(isolated.prepare())
    except (IsolationError, OSError) as error:
        raise click.ClickException(
            f"code can't be isolated here: {error}\nLinux namespaces are needed: see app/toolservers/sandbox.py."
        ) from error
    if not isolated.isolated:
        click.echo("Warning: code is confined by resource limits only: it can read what this user can.", err=True)

    from app.toolservers.code_tool import tool_server  # takes a second, which a refusal does not need
    from app.toolservers.serving import serve

    stored = Containers(private, idle_s=idle, count_max=containers, bytes_max=all_disk * MIB)
    serve(tool_server(CodeRunner(isolated, stored, runs_max=runs)), address)


def private_directory(directory: Path) -> Path:
    """The directory, created unless it exists. Raises click.ClickException if other users can read it."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise click.ClickException(f"{directory} must belong to this user alone (chmod 700).")
    return directory


if __name__ == "__main__":
    main()
