"""``sait bench``: throughput at several densities against the unpatched timm model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sait_cli import options, plans, published
from sait_cli.options import DType

if TYPE_CHECKING:
    from sait.bench.throughput import Figure
    from sait.methods import Plan
    from sait.searches import PlanFile

EXAMPLES = """\
Examples:

* sait bench
* sait bench --model vit_base_patch16_224 --keep 0.5 --dtype bf16 --batch 8
* sait bench --weights $(python -m sait.weights)
* sait bench --compare --keep 0.45 --dtype bf16
* sait bench --mass 0.9 --max-keep 120 --static
* sait bench --method sait --method evit --method tome --method ats --method ltp --method random
* sait bench --method tome --pairs 8 --pairs 16 --dtype bf16
* sait bench --model runs/ada/model.safetensors --method adavit --dtype fp32
* sait bench --plan plan.json
* sait bench --block 6 --keep 0.7 --mass 0.9 --mass 0.8 --weights random --json figures.json
"""
NEAR_UNIFORM = (
    "With random weights attention is nearly uniform, so a share of its mass keeps nearly as large a share of the "
    "tokens; trained weights keep fewer. Speed at a given number of tokens does not depend on the weights."
)


def bench(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Option(
            help="Any timm Vision Transformer, or a checkpoint of ours; by default "
            f"{options.DEFAULT_MODEL}, or that of --weights or --plan."
        ),
    ] = None,
    block: options.Block = 3,
    keep: options.Keep = [1.0, 0.7, 0.45, 0.3],  # noqa: B006  (the default that --help shows; nothing changes it)
    mass: options.Mass = [0.9],  # noqa: B006
    max_keep: options.MaxKeep = None,
    static: options.Static = False,
    method: options.Method = None,
    pairs: options.Pairs = [13],  # noqa: B006
    threshold: options.Threshold = [0.006],  # noqa: B006
    plan: plans.PlanPath = None,
    batch: Annotated[int, typer.Option(help="Images at a time.", min=1)] = 16,
    dtype: Annotated[list[DType], typer.Option(help="A table for each; repeatable.")] = [DType.bf16, DType.fp32],  # noqa: B006
    device: options.Device = "cpu",
    score: options.ScoreKind = "cls",
    weights: options.Weights = "auto",
    repeats: Annotated[int, typer.Option(help="Samples of each density.", min=1)] = 10,
    backend: options.ForcedBackend = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Also timm compiled, and at the smallest share plain torch, the same compiled, and sait.optimize.",
        ),
    ] = False,
    json: Annotated[Path | None, typer.Option(help="Also write the figures to this file.")] = None,
) -> None:
    """Throughput at several densities against the unpatched timm model.

    All of them are measured in turn in one process after warm-up; a figure is a ratio of medians. "dense mode" is
    timm's own forward; "keep 1.0" keeps all tokens, too, but runs the kernels. The images are crops of the two photos
    that scikit-learn ships.
    """
    from sait.bench import measure, throughput
    from sait.state import Density

    if compare and method:
        options.bad("--compare", "expected densities, got --method; make end-to-end compares methods.")
    if compare and score != "cls":
        options.bad("--compare", f"plain torch prunes by the score cls only, got --score {score}.")
    place = options.check_device(device, backend)
    if json is not None:
        options.check_writable(json, "--json")
    file = plans.read(context, plan)
    model = options.model_name(plans.model_of(file, model), weights)
    smaller: Callable[[Any], Any] = _as_it_is
    if file is not None:
        loaded, described, of_methods, smaller = _of_file(file, plan, model, weights)
        block, score = 0, "column"  # of the rows in which all tokens stay
    else:
        of_methods = published.of_methods(context, method or [], keep, pairs, threshold)
        if model.endswith(".safetensors"):
            loaded, block, score, of_methods = published.for_bench(context, model, of_methods)
            described = "trained weights"
        else:
            loaded, described = options.load_model(model, weights)
            if any(one.gated for one in of_methods):
                of_methods = published.of_trained(context, loaded, of_methods)
    size = loaded.patch_embed.img_size if model.endswith(".safetensors") else None
    images, pictured = options.load_images(loaded, batch, size)
    densities = [
        Density(),
        *([Density(keep=1.0)] if of_methods else options.densities(context, keep, mass, max_keep, static)),
    ]
    options.check_prunable(loaded, block, score, densities)
    if file is None:
        published.check_plans(loaded, of_methods)
    console = Console(highlight=False)
    place_of = "" if of_methods else f", block {block}, score {score}"
    console.print(f"{model}, {described}; {pictured}; batch {batch}{place_of}")
    rows: list[dict[str, Any]] = []
    for kind in dtype:
        subject = copy.deepcopy(loaded).to(place, kind.as_torch())
        pictures = images.to(place, kind.as_torch())
        for part in (part for one in of_methods for part in one.learned().values()):
            part.to(place, kind.as_torch())
        with options.progress() as bar, options.running_on(backend):
            peers, failed = (
                throughput.ready_peers(subject, pictures, block=block, keep=min(keep)) if compare else ({}, {})
            )
            task = bar.add_task(
                f"measuring {kind}", total=throughput.samples([*densities, *of_methods], repeats, peers)
            )
            figures = throughput.measure(
                subject,
                pictures,
                [*densities, *of_methods],
                block=block,
                score=score,
                repeats=repeats,
                advance=partial(bar.advance, task),
                peers=peers,
                smaller=smaller,
            )
        console.print(table(figures, kind.value))
        for name, why in failed.items():
            console.print(f"{name}: no figures: {why}")
        rows += throughput.rows(figures, model=model, batch=batch, dtype=kind.value, block=block, score=score)
    if any(one.mass is not None for one in densities) and described.startswith("random"):
        console.print(NEAR_UNIFORM)
    document = measure.results(rows, place)
    console.print(environment_line(document))
    if json is not None:
        measure.save(document, json)
        console.print(f"written: {json}")


def _as_it_is(model: Any) -> Any:
    return model


def _of_file(
    file: PlanFile, path: Path | None, name: str, weights: str
) -> tuple[Any, str, list[Plan], Callable[[Any], Any]]:
    """(the unpatched model, its weights in words, the plan of a file, what its left out parts leave of a model)."""
    import sait

    from sait_cli.eval import load

    if name.endswith(".safetensors"):
        loaded, described = load(name, 0, "column", [])[0], "trained weights"
    else:
        plans.check_name(file, path, name)
        loaded, described = options.load_model(name, weights)
    found = plans.applied(file, path, loaded)
    if hasattr(type(loaded), "_sait_original"):
        sait.restore(loaded)
    smaller = partial(sait.leave_out, parts=file.left_out) if file.left_out else _as_it_is
    return loaded, f"{described}, plan of {path}", [found._sait.plan], smaller


def table(figures: Sequence[Figure], dtype: str) -> Table:
    result = Table("density", title=dtype, title_justify="left")
    for column in ("tokens kept", "GMAC", "img/s", "× timm dense"):
        result.add_column(column, justify="right")
    for figure in figures:
        result.add_row(*cells(figure))
    return result


def cells(figure: Figure) -> Iterator[str]:
    yield figure.label
    fewest, most = min(figure.tokens), max(figure.tokens)
    mean = sum(figure.tokens) / len(figure.tokens)
    yield f"{most}" if fewest == most else f"{mean:.1f} ({fewest}–{most})"
    yield f"{figure.gmac:.2f}"
    yield f"{figure.images_per_s:.1f}"
    yield f"{figure.ratio:.2f}"


def environment_line(document: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    return f"{document['device']}, {document['threads']} threads; {versions}; {document['date']}"
