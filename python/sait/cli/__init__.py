"""The command line ``sait``: bench, show, info. One file per command; torch and timm are loaded when a command runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from sait.cli.bench import bench
from sait.cli.info import info
from sait.cli.show import show

app = typer.Typer(
    help="Vision Transformers that drop the tokens they do not need. Try: sait bench, sait show, sait info.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (bench, show, info):
    app.command()(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line. A bad argument is one line on stderr and exit code 2, never a traceback."""
    try:
        code = app(arguments, standalone_mode=False)
    except typer.TyperException as error:
        print(f"sait: {error.format_message()}", file=sys.stderr)
        code = 2
    sys.exit(code)
