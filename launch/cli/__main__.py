"""`setformer`, and `python -m launch.cli`: Ctrl-C ends it in one line from the first import on."""

import sys

from launch.cli.stopped import STOPPED, STOPPED_CODE


def main() -> None:
    """Import the commands and run the one that was asked for."""
    try:
        from launch.cli.main import main as run
    except KeyboardInterrupt:
        print(STOPPED, file=sys.stderr)
        sys.exit(STOPPED_CODE)
    run()


if __name__ == "__main__":
    main()
