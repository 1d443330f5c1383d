"""--method: the plans of published methods, with what a model has learned of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

from sait_cli import options

if TYPE_CHECKING:
    from sait.methods import Plan


OPTION = {
    "tome": "pairs",
    "ltp": "threshold",
    "ltp_learned": None,
    "adavit": None,
}  # that sets a method; of all others keep


def of_methods(
    context: typer.Context, method: list[str], keep: list[float], pairs: list[int], threshold: list[float]
) -> list[Plan]:
    """The plans of published methods, one for each of their settings; of a setting that is not given, their own."""
    from sait.methods import PUBLISHED

    given: dict[str, list[Any]] = {"keep": keep, "pairs": pairs, "threshold": threshold}
    _check_no_idle_option(context, method)
    found = []
    for name in method:
        if name not in PUBLISHED:
            options.bad("--method", f"expected one of {', '.join(PUBLISHED)}, got {name!r}.")
        option, some = OPTION.get(name, "keep"), [{}]  # type: str | None, list[dict[str, Any]]
        if option is not None and options.is_given(context, option):
            some = [{{"pairs": "r"}.get(option, option): value} for value in given[option]]
        try:
            found += [PUBLISHED[name](**setting) for setting in some]
        except (ValueError, TypeError) as error:
            options.bad(f"--{option}", options.one_line(error))
    return found


def _check_no_idle_option(context: typer.Context, method: list[str]) -> None:
    """Ends the command where an option is given that none of the methods takes."""
    takes = {OPTION.get(name, "keep") for name in method}
    idle = ("keep", "pairs", "threshold", "mass", "max_keep", "static", "block", "score") if method else ()
    for option in idle or ("pairs", "threshold"):
        if option not in takes and options.is_given(context, option):
            needs = {
                "pairs": "--method tome",
                "threshold": "--method ltp",
                "keep": "sait, evit, ats, random, dynamicvit, cagevit or hot",
            }
            cure = f"it goes with {needs[option]}" if option in needs else "methods have their own; leave it out"
            options.bad(f"--{option.replace('_', '-')}", f"no method here takes it: {cure}.")


def of_trained(context: typer.Context, model: Any, plans: Sequence[Plan]) -> list[Plan]:
    """The plans with what the model has learned; without any, its own where that is a method's.

    A method with something to learn that the model was not trained with ends the command.
    """
    from sait.families import family_of
    from sait.sparsify import SparseModel, learned_by

    if not plans and isinstance(model, SparseModel):
        own = model._sait.plan
        if len(own.stages) == 1 and not own.learned():
            return []
        for option in ("keep", "mass", "max_keep", "static"):
            if options.is_given(context, option):
                cure = f"expected --method with it, for {own.name} is no plan of one share; or leave it out."
                options.bad(f"--{option.replace('_', '-')}", cure)
        return [own]
    family, learned, found = family_of(type(model)), learned_by(model), []
    for plan in plans:
        if family is None or not plan.unlearned({}):
            found.append(plan)
            continue
        placed = plan.for_depth(len(family.blocks(model)))
        if missing := placed.unlearned(learned):
            blocks = ", ".join(map(str, missing))
            options.bad(
                "--method",
                f"{placed.name} has something to learn at blocks {blocks}, and this model has learned nothing there; "
                "train it by sait train --method, and name that checkpoint.",
            )
        found.append(placed.with_learned(learned))
    return found


def for_bench(context: typer.Context, path: str, plans: Sequence[Plan]) -> tuple[Any, int, str, list[Plan]]:
    """(the model of a checkpoint, no longer sparse; the first block where it drops tokens; its score; the plans with
    what it has learned)."""
    import sait
    from sait.sparsify import SparseModel

    from sait_cli.show import load_checkpoint

    model, block, score = load_checkpoint(path)
    if not isinstance(model, SparseModel):
        options.bad("--model", f"expected a checkpoint of a timm model, got a {type(model).__name__}.")
    plans = of_trained(context, model, plans)
    return sait.restore(model), block, score, plans


def check_plans(model: Any, plans: Sequence[Plan]) -> None:
    """Ends the command with the model layer's own words where it refuses a method."""
    import sait
    from sait.sparsify import SparseModel

    own = model._sait.plan if isinstance(model, SparseModel) else None
    try:
        for plan in plans:
            sait.sparsify(model, plan)
    except (ValueError, TypeError) as error:
        options.bad("--method", options.one_line(error))
    if own is not None:
        sait.sparsify(model, own)
    elif isinstance(model, SparseModel):
        sait.restore(model)
