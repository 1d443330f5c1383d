"""A sparse model at one density, from what is typed: what embed, predict and export work with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any

import typer

from sait_cli import options

ModelName = Annotated[
    str | None,
    typer.Option(
        help=f"A checkpoint of `sait train`, or any timm Vision Transformer; by default {options.DEFAULT_MODEL}, or "
        "that of --weights."
    ),
]
Share = Annotated[float | None, typer.Option(help="Share of the patches to keep.")]
MassShare = Annotated[
    float | None, typer.Option(help="Cumulative score (top-p): share of the score to keep, image by image.")
]
BlockOf = Annotated[
    int | None, typer.Option(help="Where tokens are dropped, from 0: 3; a checkpoint has its own.", min=0)
]
ScoreOf = Annotated[str | None, typer.Option(help="What ranks the tokens: cls; a checkpoint has its own.")]


def sparse_model(asked: Mapping[str, Any]) -> tuple[Any, str]:
    """(the sparse model at its density, what it is in words), of these options, --weights, --max-keep, --static."""
    import sait
    from sait.state import Density

    name, keep, mass = asked["model"], asked["keep"], asked["mass"]
    if keep is not None and mass is not None:
        options.bad("--mass", "expected one of --keep and --mass, got both; leave one out.")
    options.check_keep([] if keep is None else [keep])
    options.check_mass([] if mass is None else [mass])
    static = asked.get("static", False)
    options.check_limits(mass is not None, asked["max_keep"], static)
    density = Density(keep, mass, asked["max_keep"], static)
    if name is not None and name.endswith(".safetensors"):
        return _checkpoint(name, density, asked)
    block, score = 3 if asked["block"] is None else asked["block"], asked["score"] or "cls"
    name = options.model_name(name, asked["weights"])
    model, described = options.load_model(name, asked["weights"])
    options.check_prunable(model, block, score, [density])
    if asked["weights"] == "auto" and described.startswith("random"):
        options.bad("--weights", f"expected trained ones, got {described}; name a file, or random if you mean it.")
    sait.set_density(sait.sparsify(model, block=block, keep=1.0, score=score), **asdict(density))
    words = density.label if density == Density() else density.plan(block, score)
    return model, f"{name}, {described}; {words}"


def _checkpoint(path: str, density: Any, asked: Mapping[str, Any]) -> tuple[Any, str]:
    import sait
    from sait.state import Density

    for option, absent in (("block", None), ("score", None), ("weights", "auto")):
        if asked[option] != absent:
            options.bad(f"--{option}", f"{path} has its own, got {asked[option]}; leave it out.")
    try:
        model = sait.load(path)
        if density != Density():
            sait.set_density(model, **asdict(density))
    except OSError as error:
        options.bad("--model", f"cannot read {path}: {error.strerror or error}.")
    except (TypeError, ValueError) as error:
        options.bad("--model", options.one_line(error))
    plan = sait.density(model)
    return model, f"{path}; {'dense mode' if plan is None else plan.name}"
