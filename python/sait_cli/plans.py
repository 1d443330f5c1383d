"""--plan FILE of bench, eval and show: a plan that ``sait tune --search`` found."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sait_cli import options

if TYPE_CHECKING:
    from sait.searches import PlanFile

PlanPath = Annotated[
    Path | None,
    typer.Option("--plan", help="A file of `sait tune --search`, in place of densities or methods; it has its model."),
]
IDLE = ("keep", "mass", "max_keep", "static", "method", "pairs", "threshold", "block", "score", "compare")


def read(context: typer.Context, path: Path | None) -> PlanFile | None:
    """The file, if one is named; what is wrong with it, or given beside it in vain, is one line."""
    from sait.searches import PlanFile

    if path is None:
        return None
    for option in IDLE:
        source = context.get_parameter_source(option) if option in context.params else None
        if source is not None and source.name == "COMMANDLINE":
            options.bad(f"--{option.replace('_', '-')}", "the file of --plan has its own plan; leave it out.")
    try:
        return PlanFile.read(path)
    except OSError as error:
        options.bad("--plan", f"cannot read {path}: {error.strerror or error}.")
    except ValueError as error:
        options.bad("--plan", options.one_line(error))


def model_of(file: PlanFile | None, given: str | None) -> str | None:
    """The model that is named, else the file's own."""
    if file is None or given is not None:
        return given
    name = file.model
    if name.endswith(".safetensors") and not Path(name).is_file():
        options.bad("--model", f"the plan is for {name}, which is not here; name the model.")
    return name


def check_name(file: PlanFile, path: Path | None, name: str) -> None:
    """Another model of timm than the file's ends the command; checkpoints may have moved."""
    both = (name, file.model)
    if name != file.model and not any(one.endswith(".safetensors") for one in both):
        options.bad("--plan", f"{path} is a plan for {file.model}, got {name}; name that model, or search a plan anew.")


def applied(file: PlanFile, path: Path | None, model: Any) -> Any:
    """A copy of the model that is what was found; it shares the parameters that are whole."""
    from sait.bench.plain import share

    try:
        return file.apply(share(model), str(path))
    except (TypeError, ValueError) as error:
        options.bad("--plan", options.one_line(error))
