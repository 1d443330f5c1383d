"""``sait eval``: accuracy, tokens, cost and speed at several densities."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sait_cli import options, plans, published
from sait_cli.options import DType
from sait_cli.train import training

if TYPE_CHECKING:
    from sait.train.evaluate import Result

EXAMPLES = """\
Examples:

* sait eval runs/sait/model.safetensors
* sait eval runs/sait/model.safetensors --keep 0.45 --mass 0.9 --dtype bf16 --json accuracy.json
* sait eval runs/sait/model.safetensors --method evit --method tome --pairs 4
* sait eval runs/sait/model.safetensors --plan plan.json
* sait eval deit_small_patch16_224 --data imagenet --block 3 --keep 0.7 --keep 0.45
* torchrun --nproc-per-node 2 -m sait_cli eval runs/sait/model.safetensors
"""


def evaluate(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="A checkpoint of `sait train`, or a timm model with pretrained weights.")
    ],
    data: Annotated[str, typer.Option(help="A folder with train/ and val/, or canvas or stamps.")] = "canvas",
    keep: options.Keep = [0.7, 0.45, 0.3, 0.15],  # noqa: B006  (the default that --help shows; nothing changes it)
    mass: options.Mass = [0.9],  # noqa: B006
    max_keep: options.MaxKeep = None,
    static: options.Static = False,
    method: options.Method = None,
    pairs: options.Pairs = [13],  # noqa: B006
    threshold: options.Threshold = [0.006],  # noqa: B006
    plan: plans.PlanPath = None,
    block: Annotated[int, typer.Option(help="Where a timm model drops tokens; a checkpoint has its own.", min=0)] = 3,
    score: options.ScoreKind = "cls",
    images: Annotated[int, typer.Option(help="Test images of canvas or stamps.", min=1)] = 2000,
    batch: Annotated[int, typer.Option(help="Images at a time, over all processes.", min=1)] = 128,
    dtype: Annotated[DType, typer.Option(help="Of autocast; fp32 is none.")] = DType.fp32,
    device: options.Device = "cpu",
    workers: Annotated[int, typer.Option(help="Processes that load images from a folder.", min=0)] = 4,
    json: Annotated[Path | None, typer.Option(help="Also write the results to this file.")] = None,
) -> None:
    """Accuracy on held-out images, tokens kept, multiply-adds and speed, at several densities or by several methods.

    Under torchrun every process takes a part of the images.
    """
    from sait.bench import measure
    from sait.state import Density
    from sait.train.config import Config
    from sait.train.data import expected_by, open_data
    from sait.train.evaluate import evaluate

    options.check_device(device, None)
    file = plans.read(context, plan)
    of_methods = published.of_methods(context, method or [], keep, pairs, threshold)
    densities = [] if of_methods or file else options.densities(context, keep, mass, max_keep, static)
    with training(device) as processes:
        assert processes is not None
        if json is not None and processes.first:
            options.check_writable(json, "--json")
        subject, described = load(model, block, score if file is None else "column", densities)
        found = None
        if file is not None:
            plans.check_name(file, plan, model)
            found, described = plans.applied(file, plan, subject).to(processes.device), f"plan of {plan}"
        else:
            of_methods = published.of_trained(context, subject, of_methods)
            published.check_plans(subject, of_methods)
        densities = [Density(), *([] if of_methods else densities)]
        wanted = Config(data=data, canvas_eval_images=images, stamps_eval_images=images, batch=batch, workers=workers)
        check_classes(subject, data)
        source = open_data(wanted, expected_by(subject), processes, for_training=False, held_out="test")
        with options.progress() as bar:
            times = 1 if found is None else 2
            task = bar.add_task(
                "evaluating", total=times * -(-source.held_out_images // batch), visible=processes.first
            )
            run = partial(evaluate, dtype=dtype.as_torch(), advance=lambda: bar.advance(task))
            results = run(subject.to(processes.device), source, [*densities, *of_methods], processes)
            if found is not None:  # a model of its own, for parts of it may be left out
                results += run(found, source, [found._sait.plan], processes)
        if not processes.first:
            return
    console = Console(highlight=False)
    console.print(f"{model}, {described}; {results[0].images} images of {data}, {dtype}", soft_wrap=True)
    console.print(table(results))
    if file is not None and file.left_out:
        console.print(f"left out: {file.left_out}")
    if json is not None:
        rows = [as_row(result) for result in results]
        measure.save(measure.results(rows, device, model=model, data=data, dtype=dtype.value), json)
        console.print(f"written: {json}")


def load(name: str, block: int, score: str, densities: Sequence[Any]) -> tuple[Any, str]:
    """(the sparse model, what it is in words)."""
    import sait
    from sait.state import state_of
    from sait.train.distill import load_checkpoint

    if Path(name).is_file() or name.endswith(".safetensors"):
        model = load_checkpoint(name, "MODEL")
        plan = state_of(model, "eval").plan
        if len(plan.stages) > 1 or plan.stages[0].scorer_given:
            return model, plan.name
        return model, f"block {plan.stages[0].block}, score {plan.score}"
    model, described = options.load_model(name, "auto")
    options.check_prunable(model, block, score, densities)
    return sait.sparsify(model, block=block, keep=1.0, score=score), f"{described}, block {block}, score {score}"


def check_classes(model: Any, data: str) -> None:
    from sait.train.config import TrainingError
    from sait.train.data import class_names

    classes = len(class_names(data))
    if model.num_classes != classes:
        raise TrainingError(f"--data: {data} has {classes} classes, and the model tells {model.num_classes} apart.")


def table(results: Sequence[Result]) -> Table:
    found = Table("density")
    for column in ("accuracy", "lost", "tokens", "GMAC", "img/s"):
        found.add_column(column, justify="right")
    dense = results[0]
    for result in results:
        found.add_row(
            result.label,
            f"{result.accuracy:.2%}",
            f"{100 * (dense.accuracy - result.accuracy):.2f}",
            f"{result.tokens:.1f}",
            f"{result.gmac:.4g}",
            f"{result.images_per_s:.0f}",
        )
    return found


def as_row(result: Result) -> dict[str, Any]:
    return {
        "name": "accuracy",
        "case": result.label,
        "images": result.images,
        "accuracy": result.accuracy,
        "tokens": round(result.tokens, 2),
        "gmac": result.gmac,
        "images_per_s": round(result.images_per_s, 1),
    }
