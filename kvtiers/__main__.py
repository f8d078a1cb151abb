"""`python -m kvtiers`, and what the installed command `kvtiers` runs: the command line, or what it needs to run."""

import sys

from kvtiers.errors import KVTiersError, MissingExtraError


def main() -> None:
    """Run the command line; without the extra `cli`, say so in one line."""
    try:
        from kvtiers.cli import main as commands
    except MissingExtraError as error:
        sys.exit(f"kvtiers: {error}")
    try:
        commands(prog_name="kvtiers")
    except KVTiersError as error:
        sys.exit(f"kvtiers: {error}")


if __name__ == "__main__":
    main()
