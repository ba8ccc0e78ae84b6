"""The memory that a served process holds at most."""

from pathlib import Path

import pytest

from tests.servers import Served

GROWTH_MAX_KB = 150_000
"""How much more than before a server may hold while it is flooded: what comes is a gigabyte, or has no end."""

needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc")


class Grown:
    """By how much the resident memory of a process has grown at most."""

    def begin(self, served: Served) -> None:
        """From now on."""
        self._process = Path(f"/proc/{served.process.pid}")
        (self._process / "clear_refs").write_text("5")  # the peak is now what is held now
        self._before_kb = self._read("VmRSS")

    def most_kb(self) -> int:
        """Until now."""
        growth_kb = self._read("VmHWM") - self._before_kb
        print(f"FIGURE {growth_kb / 1000:.0f} MB more at most")
        return growth_kb

    def _read(self, field: str) -> int:
        lines = (self._process / "status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))
