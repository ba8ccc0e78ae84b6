"""The story of the tools that the server runs, as its script tells it."""

import subprocess
import sys

from tests.servers import ROOT


def test_the_story_of_tools_ends_well():
    told = subprocess.run(
        [sys.executable, "-m", "tests.tools_story"], cwd=ROOT, capture_output=True, text=True, timeout=110, check=False
    )
    print(told.stdout)  # captured, and shown only for a failed test
    assert told.returncode == 0, told.stderr
    assert told.stdout.endswith("All of it held.\n")
    assert told.stdout.count("kill -9 of the worker") == 2
    assert "VIOLATED" not in told.stdout
