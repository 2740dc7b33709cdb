"""The command line: `lte train`, `eval`, `generate`, `inspect`, `report`, and `demo`."""

from lte.cli.app import app

__all__ = ["app", "main"]


def main() -> None:
    """Runs the `lte` command."""
    app(prog_name="lte")
