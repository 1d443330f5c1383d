"""``sait tune``: the fastest block and density within an accuracy budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sait_cli import eval, options, published
from sait_cli import search as searching
from sait_cli.agreement import are_images
from sait_cli.options import DType
from sait_cli.train import training

if TYPE_CHECKING:
    from sait.methods import Plan
    from sait.state import Density
    from sait.train.tune import Candidate


class Objective(StrEnum):
    macs = "macs"
    speed = "speed"


EXAMPLES = """\
Examples:

* sait tune runs/sait/model.safetensors
* sait tune runs/sait/model.safetensors --max-drop 1.0 --block 1 --block 2 --mass 0.9 --mass 0.8
* sait tune deit_small_patch16_224 --data imagenet --block 3 --block 5 --dtype bf16
* sait tune deit_small_patch16_224 photos --agreement 0.99
* sait tune --agreement 0.99 --weights $(python -m sait.weights) photos
* sait tune runs/sait/model.safetensors --search plan.json --max-drop 0.5
* sait tune deit_small_patch16_224 --data imagenet --search plan.json --method evit --method tome --leave-out
* sait tune deit_small_patch16_224 photos --agreement 0.98 --search plan.json --minutes 30
* sait tune deit_small_patch16_224 photos --agreement 0.98 --method sait --method tome --pairs 8 --pairs 12
"""


def tune(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            help="A checkpoint of `sait train`, or a timm model with pretrained weights. With --agreement it may be "
            f"left out: {options.DEFAULT_MODEL}, or that of --weights."
        ),
    ] = None,
    pictures: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[IMAGES]...", help="Of --agreement: your pictures, or folders of them."),
    ] = None,
    agreement: Annotated[
        float | None,
        typer.Option(
            help="In place of accuracy: the share of your own unlabelled pictures whose answer must be the dense "
            "model's; or, of a model without classes, the cosine of its features."
        ),
    ] = None,
    data: Annotated[str, typer.Option(help="A folder with train/ and val/, or canvas or stamps.")] = "canvas",
    max_drop: Annotated[float, typer.Option(help="Points of accuracy, in percent, that may be lost.", min=0.0)] = 0.5,
    block: Annotated[
        list[int] | None,
        typer.Option(
            help="A block to try; repeatable. By default the first half but block 0; with --agreement one, a quarter."
        ),
    ] = None,
    keep: options.Keep = [0.7, 0.5, 0.4, 0.3, 0.2],  # noqa: B006  (the default that --help shows; nothing changes it)
    mass: options.Mass = [],  # noqa: B006
    max_keep: options.MaxKeep = None,
    static: options.Static = False,
    score: options.ScoreKind = "cls",
    method: options.Method = None,
    search: Annotated[
        Path | None,
        typer.Option(
            help="Search blocks, stages and densities for the fewest multiply-adds within --max-drop or --agreement, "
            "report it on other images, and write it here, for --plan of bench, eval and show."
        ),
    ] = None,
    leave_out: Annotated[
        bool, typer.Option("--leave-out", help="Of --search: also leave out blocks, heads and groups of MLP channels.")
    ] = False,
    groups: Annotated[int, typer.Option(help="Of --leave-out: groups of an MLP's channels.", min=2)] = 8,
    sure: Annotated[
        bool,
        typer.Option(
            "--sure", help="Of --search: the worse end of the interval of 95 % of what is lost keeps the budget."
        ),
    ] = False,
    by: Annotated[
        Objective, typer.Option(help="Of --search: what is to be least; speed is measured, for a quiet machine.")
    ] = Objective.macs,
    max_stages: Annotated[int, typer.Option(help="Of --search: to which a plan may grow.", min=1)] = 3,
    evaluations: Annotated[int | None, typer.Option(help="Of --search: models to look at, at most.", min=1)] = None,
    minutes: Annotated[float | None, typer.Option(help="Of --search: for at most so long.", min=0.01)] = None,
    seed: Annotated[int, typer.Option(help="Of --search: which images of a folder are held out.", min=0)] = 0,
    pairs: options.Pairs = [13],  # noqa: B006
    threshold: options.Threshold = [0.006],  # noqa: B006
    weights: options.Weights = "auto",
    images: Annotated[
        int,
        typer.Option(
            help="Validation images of canvas or stamps; with --search of any data, and as many others.", min=1
        ),
    ] = 1000,
    batch: Annotated[int, typer.Option(help="Images at a time.", min=1)] = 64,
    repeats: Annotated[int, typer.Option(help="Samples of each time.", min=1)] = 10,
    dtype: Annotated[DType, typer.Option(help="Of autocast; fp32 is none.")] = DType.fp32,
    device: options.Device = "cpu",
    workers: Annotated[int, typer.Option(help="Processes that load images from a folder.", min=0)] = 4,
    json: Annotated[Path | None, typer.Option(help="Also write the figures to this file.")] = None,
) -> None:
    """Measures accuracy and speed for every pair of a block and a density, and names the fastest within --max-drop.

    The trade-off curve has the settings that no other beats in both. A checkpoint keeps its own score. On canvas this
    looks at validation images: `sait eval` then judges the choice on others.

    With --agreement nothing needs a label: the pruned model is held against the dense one on your own pictures.

    With --search it looks further, at plans of several stages and methods, greedily, and reports the best on images
    that the search never saw. Ctrl-C ends a search, and the best so far is reported and written.
    """
    if search is None:
        searching.check_needed(context)
    else:
        words = [model] if model is not None and agreement is not None and are_images(model) else []
        how = {
            "methods": method or None,
            "blocks": block or None,
            "max_stages": max_stages,
            "leave_out": leave_out,
            "groups": groups,
            "sure": sure,
            "by": by.value,
            "repeats": repeats,
            "evaluations": evaluations,
            "minutes": minutes,
        }
        return searching.run(
            context,
            searching.Wanted(
                out=search,
                model=None if words else model,
                weights=weights,
                pictures=[*map(Path, words), *(pictures or [])],
                agreement=agreement,
                data=data,
                max_drop=max_drop,
                images=images,
                batch=batch,
                workers=workers,
                device=device,
                dtype=dtype,
                seed=seed,
                how=how,
            ),
        )
    from sait.bench import measure
    from sait.train.config import Config
    from sait.train.data import expected_by, open_data
    from sait.train.tune import fastest, frontier, steps
    from sait.train.tune import tune as measure_all

    place = options.check_device(device, None)
    if json is not None:
        options.check_writable(json, "--json")
    densities = options.densities(context, keep, mass, max_keep, static)
    plans = published.of_methods(context, method or [], keep, pairs, threshold)
    if agreement is not None:
        given = [Path(model)] if model is not None and are_images(model) else []
        name = None if given else model
        return _by_agreement(
            context,
            name,
            [*given, *(pictures or [])],
            weights=weights,
            blocks=block or [],
            densities=densities,
            plans=plans,
            score=score,
            agreement=agreement,
            batch=batch,
            dtype=dtype,
            place=place,
            repeats=repeats,
            json=json,
        )
    if model is None or pictures or plans or weights != "auto":
        options.bad("--agreement", "expected it with IMAGES, --method or --weights, or a MODEL alone; got none.")
    with training(device) as processes, options.progress() as bar:
        assert processes is not None
        subject, described = eval.load(model, 0, score, densities)
        depth = len(subject.blocks)
        blocks = sorted(set(block or range(1, max(2, depth // 2))))
        for b in blocks:
            if not 0 <= b < depth:
                options.bad("--block", f"expected 0 to {depth - 1}, for the model has {depth} blocks; got {b}.")
        eval.check_classes(subject, data)
        wanted = Config(data=data, canvas_eval_images=images, stamps_eval_images=images, batch=batch, workers=workers)
        source = open_data(wanted, expected_by(subject), processes, for_training=False)
        sample, _ = next(iter(source.held_out_batches()))
        batches = -(-source.held_out_images // batch)
        task = bar.add_task("measuring", total=steps(batches, len(blocks), len(densities), repeats))
        settings = measure_all(
            subject.to(place),
            source,
            sample.to(place),
            blocks=blocks,
            densities=densities,
            dtype=dtype.as_torch(),
            repeats=repeats,
            advance=lambda: bar.advance(task),
        )
    best = fastest(settings, max_drop / 100)
    console = Console(highlight=False)
    about = f"{model}, {described}; {source.held_out_images} images of {data}, batch {len(sample)}, {dtype}"
    console.print(about, soft_wrap=True)
    console.print(table(frontier(settings), settings[0], best))
    console.print(
        f"fastest within {max_drop:g} points: {best.label}, {best.images_per_s / settings[0].images_per_s:.2f} × dense"
    )
    if json is not None:
        rows = [as_row(setting) for setting in settings]
        measure.save(measure.results(rows, place, model=model, data=data, dtype=dtype.value), json)
        console.print(f"written: {json}")


def _by_agreement(
    context: typer.Context,
    name: str | None,
    paths: list[Path],
    *,
    weights: str,
    blocks: list[int],
    densities: Sequence[Density],
    plans: list[Plan],
    score: str,
    agreement: float,
    **measuring: Any,
) -> None:
    """The same without labels."""
    import sait
    from sait.state import state_of

    from sait_cli import agreement as by_agreement

    if not paths:
        options.bad("IMAGES", "expected pictures or folders of them, got none.")
    if not 0 < agreement < 1:
        options.bad("--agreement", f"expected a number in (0, 1) such as 0.99, got {agreement:g}.")
    files = by_agreement.files_in(paths)
    if name is not None and name.endswith(".safetensors"):
        subject, described = eval.load(name, 0, score, densities)
        score = str(state_of(subject, "tune").plan.score)
    else:
        name = options.model_name(name, weights)
        subject, described = options.load_model(name, weights)
    depth = len(subject.blocks)
    for block in blocks:
        if not 0 <= block < depth:
            options.bad("--block", f"expected 0 to {depth - 1}, for the model has {depth} blocks; got {block}.")
    if not plans:
        plans = [
            sait.Plan((sait.Stage(block, **asdict(one)),), score, label=f"block {block}, {one.label}")
            for block in sorted(set(blocks or [depth // 4]))
            for one in densities
        ]
    plans = published.of_trained(context, subject, plans)
    for part in (part for plan in plans for part in plan.learned().values()):
        part.to(measuring["place"], measuring["dtype"].as_torch())
    published.check_plans(subject, plans)
    by_agreement.calibrate(*(subject.eval(), f"{name}, {described}", files, plans), agreement=agreement, **measuring)


def table(settings: Sequence[Candidate], dense: Candidate, best: Candidate) -> Table:
    found = Table("setting", title="trade-off curve", title_justify="left")
    for column in ("accuracy", "lost", "tokens", "GMAC", "img/s", "× dense"):
        found.add_column(column, justify="right")
    for setting in settings:
        result = setting.result
        found.add_row(
            setting.label,
            f"{result.accuracy:.2%}",
            f"{100 * (dense.result.accuracy - result.accuracy):.2f}",
            f"{result.tokens:.1f}",
            f"{result.gmac:.4g}",
            f"{setting.images_per_s:.0f}",
            f"{setting.images_per_s / dense.images_per_s:.2f}",
            style="bold" if setting is best else None,
        )
    return found


def as_row(setting: Candidate) -> dict[str, Any]:
    row = {**eval.as_row(setting.result), "images_per_s": round(setting.images_per_s, 1)}
    return row if setting.block is None else {**row, "block": setting.block}
