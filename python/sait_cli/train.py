"""``sait train``: one model for every density, from a config file."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from sait_cli import options

if TYPE_CHECKING:
    from sait.train.processes import Processes

EXAMPLES = """\
Examples:

* sait train
* sait train --config canvas --out runs/plain --set mode=dense
* sait train --config canvas --out runs/sait --teacher runs/plain/model.safetensors
* sait train --config canvas --out runs/sait --teacher runs/plain/model.safetensors --resume
* sait train --config canvas --out runs/column --set score=column --set "keep=[0.2, 0.8]" --seed 1
* sait train --config canvas --out runs/dyn --method dynamicvit --set keep=0.7 --init plain.safetensors
* torchrun --nproc-per-node 8 -m sait_cli train --config deit_small_imagenet --data imagenet
"""


def train(
    config: Annotated[
        str | None,
        typer.Option(
            help="A YAML file, or canvas or deit_small_imagenet, which come along. "
            "\\[default: canvas, where neither data nor model is named]"
        ),
    ] = None,
    data: Annotated[str | None, typer.Option(help="A folder with train/ and val/, or canvas or stamps.")] = None,
    model: Annotated[str | None, typer.Option(help="Any timm Vision Transformer.")] = None,
    method: Annotated[
        str | None,
        typer.Option(help="A published method to train in place of SaiT's epochs: dynamicvit, evit, ats ..."),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="A checkpoint of ours, or a pretrained timm model; none: no distillation.")
    ] = None,
    init: Annotated[str | None, typer.Option(help="A checkpoint of ours to start from.")] = None,
    out: Annotated[str | None, typer.Option(help="The folder for checkpoints and metrics.csv.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs, dense and sparse together.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything that is drawn.")] = None,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda.")] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="key=value for any key of the config; repeatable.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the folder's last.pt ends.")] = False,
) -> None:
    """Trains one model for every density: odd epochs dense, even ones sparse (SaiT, arXiv 2210.05832); or by --method.

    Options win over --set, which wins over the config file. Under torchrun the processes share every batch.
    """
    from sait.train import Config, train
    from sait.train.config import parse_change, read_config

    named = {
        "data": data,
        "model": model,
        "method": method,
        "teacher": teacher,
        "init": init,
        "out": out,
        "epochs": epochs,
        "seed": seed,
        "device": device,
    }
    with training(None) as _:
        changes = dict(map(parse_change, change or []))
        changes |= {key: value for key, value in named.items() if value is not None}
        if config is None and not {"data", "model"} & set(changes):
            config = "canvas"
        chosen: Config = read_config(config, changes)
    options.check_device(chosen.device, None)
    with training(chosen.device) as processes, options.progress() as bar:
        assert processes is not None
        console = bar.console if not bar.disable else Console(highlight=False, stderr=True)
        task = bar.add_task("starting", visible=processes.first)

        def advance(description: str, done: int, total: int) -> None:
            bar.update(task, description=description, completed=done, total=total)

        path = train(
            chosen,
            processes,
            resume=resume,
            # A resumed run is the run that was interrupted: this command, from the start, gives the same weights.
            command=shlex.join(["sait", *(word for word in sys.argv[1:] if word != "--resume")]),
            advance=advance,
            on_epoch=lambda row: console.print(line(row), highlight=False, soft_wrap=True),
        )
        if processes.first:
            print(f"written: {path}")


def line(row: dict[str, Any]) -> str:
    """A row of metrics.csv in words."""
    words = f"epoch {row['epoch']} ({row['mode']}): loss {row['loss']:.4f}, {row['images_per_s']:.0f} img/s"
    found = [f"{key.partition(', ')[2]} {value:.1%}" for key, value in row.items() if key.startswith("accuracy, ")]
    return "; ".join([words, *found])


@contextlib.contextmanager
def training(device: str | None) -> Iterator[Processes | None]:
    """The processes that train on a device, if one is named; what stops a training is one line."""
    from sait.train import StoppedError, TrainingError
    from sait.train.processes import processes

    try:
        with processes(device) if device else contextlib.nullcontext() as found:
            yield found
    except TrainingError as error:
        failure = typer.TyperException(options.one_line(error))
        failure.exit_code = 1 if isinstance(error, StoppedError) else 2
        raise failure from error
