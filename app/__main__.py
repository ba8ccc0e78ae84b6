"""`python -m app`, and the console script."""

import os
import signal
import sys


def main() -> None:
    """Run the command line. Until a command listens for Ctrl-C itself, it ends the process at once, in the middle of an import too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _occupy_standard_streams()
    from app import cli

    cli.main()


def _occupy_standard_streams() -> None:
    """Where the parent process has closed one, another file would get its number, on which uvloop aborts."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")


if __name__ == "__main__":
    main()
