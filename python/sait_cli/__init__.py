"""The command line ``sait``: bench, show, train, eval, tune, export, embed, predict, info.

One file per command; what it needs is imported when it runs. A package beside ``sait``, whose import takes seconds:
neither --help nor the completion of a shell loads torch or timm.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from sait_cli import bench, embed, eval, export, info, show, train, tune

app = typer.Typer(
    help="Vision Transformers that drop the tokens they do not need. "
    "Try: sait bench, sait show, sait train, sait eval, sait tune, sait export, sait embed, sait predict, sait info.",
    epilog="Exit codes: 0 done; 1 a run that could not go on; 2 an argument that cannot be; 130 interrupted.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(epilog=bench.EXAMPLES)(bench.bench)
app.command(epilog=show.EXAMPLES)(show.show)
app.command(epilog=train.EXAMPLES)(train.train)
app.command("eval", epilog=eval.EXAMPLES)(eval.evaluate)
app.command(epilog=tune.EXAMPLES)(tune.tune)
app.command(epilog=export.EXAMPLES)(export.export)
app.command(epilog=embed.EXAMPLES)(embed.embed)
app.command(epilog=embed.EXAMPLES_OF_PREDICT)(embed.predict)
app.command(epilog=info.EXAMPLES)(info.info)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line. A bad argument is one line on stderr and exit code 2, never a traceback."""
    try:
        code = app(arguments, standalone_mode=False)
    except typer.TyperException as error:
        if error.format_message():  # empty where the help has been printed instead
            print(f"sait: {error.format_message()}", file=sys.stderr)
        code = error.exit_code
    sys.exit(code or 0)
