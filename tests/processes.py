"""Looks at other processes from outside. One may end at any moment: what is read of it is empty then."""

from pathlib import Path


def runs(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    fields = _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return bool(fields) and fields[0] != "Z"


def children(pid: int) -> list[int]:
    """What a process has started, any of its threads."""
    return [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in _read(path).split()]


def command(pid: int) -> str:
    """The command line, with blanks between its words."""
    return _read(Path(f"/proc/{pid}/cmdline")).replace("\0", " ")


def processes(marker: str) -> dict[int, str]:
    """The processes on this machine whose command line contains a marker, by pid."""
    lines = {int(path.name): command(int(path.name)) for path in Path("/proc").glob("[0-9]*")}
    return {pid: line for pid, line in lines.items() if marker in line}


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""
