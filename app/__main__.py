"""`python -m app`, and the console script."""

import signal


def main() -> None:
    """Run the command line. Until a command listens for Ctrl-C itself, it ends the process at once, in the middle of an import too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from app import cli

    cli.main()


if __name__ == "__main__":
    main()
