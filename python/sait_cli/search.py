"""``sait tune --search FILE``: blocks, stages and densities within an accuracy budget, judged on unseen images."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from sait_cli import agreement as by_agreement
from sait_cli import eval, options
from sait_cli.options import DType
from sait_cli.train import training

if TYPE_CHECKING:
    import torch
    from sait.searches import Found, PlanFile
    from sait.train.data import Data

IDLE = ("keep", "mass", "max_keep", "static", "pairs", "threshold", "score", "json")
NEEDED = ("leave_out", "groups", "sure", "by", "max_stages", "evaluations", "minutes", "seed")


@dataclass(frozen=True)
class Wanted:
    """What the options of `sait tune` say of a search."""

    out: Path
    model: str | None
    weights: str
    pictures: Sequence[Path]
    agreement: float | None
    data: str
    max_drop: float
    images: int
    batch: int
    workers: int
    device: str
    dtype: DType
    seed: int
    how: dict[str, Any]  # what goes to sait.search as it is


def check_needed(context: typer.Context) -> None:
    """Ends the command where an option of --search is given without it."""
    for option in NEEDED:
        if options.is_given(context, option):
            options.bad(f"--{option.replace('_', '-')}", "it goes with --search FILE; add that, or leave it out.")


def run(context: typer.Context, wanted: Wanted) -> None:
    """Searches, reports, and writes the file."""
    for option in IDLE:
        if options.is_given(context, option):
            cure = "a search chooses densities for itself; leave it out"
            options.bad(f"--{option.replace('_', '-')}", f"got it with --search: {cure}.")
    options.check_writable(wanted.out, "--search")
    place = options.check_device(wanted.device, None)
    if wanted.agreement is None:
        if wanted.model is None or wanted.pictures:
            options.bad("--agreement", "expected it with IMAGES, or a MODEL alone and its --data; got none.")
        found, name, about = _by_labels(wanted, wanted.model, place)
    else:
        found, name, about = _by_agreement(wanted, place)
    file = found.file(name, shlex.join(["sait", *sys.argv[1:]]))
    file.save(wanted.out)
    console = Console(highlight=False)
    console.print(about, soft_wrap=True)
    console.print(table(file))
    for line in report(file):
        console.print(line, soft_wrap=True)
    console.print(f"written: {wanted.out}")


def _by_labels(wanted: Wanted, model: str, place: torch.device) -> tuple[Found, str, str]:
    """(what was found, the model's name, what was looked at in words): by labelled images."""
    from sait.train.config import Config
    from sait.train.data import Half, expected_by, open_data

    with training(wanted.device) as processes:
        assert processes is not None
        if processes.world_size > 1:
            options.bad("--search", f"it runs in one process, got {processes.world_size}; start it without torchrun.")
        subject, described = _load(model, wanted.weights)
        eval.check_classes(subject, wanted.data)
        of_data: dict[str, Any] = {"canvas_eval_images": wanted.images, "stamps_eval_images": wanted.images}
        config = Config(data=wanted.data, batch=wanted.batch, workers=wanted.workers, **of_data)
        open_part = partial(open_data, config, expected_by(subject), processes, for_training=False)
        halves = [Half(number, wanted.images, wanted.seed) for number in range(2)]
        here, there = (
            open_part(held_out=split, half=half) for split, half in zip(("validation", "test"), halves, strict=True)
        )
        if min(here.held_out_images, there.held_out_images) == 0:
            options.bad("--data", f"{wanted.data}: expected two images at least, to search on one and report another.")
        drawn = wanted.data in ("canvas", "stamps")
        search, held_out = ([*one.held_out_batches()] if drawn else HeldOutBatches(one) for one in (here, there))
        found = _search(wanted, subject.to(place), search, held_out, max_drop=wanted.max_drop / 100)
    images = f"{here.held_out_images} validation and {there.held_out_images} test images of {wanted.data}"
    if not drawn:
        images = f"{here.held_out_images} images of {wanted.data} to search on, {there.held_out_images} others"
    return found, model, f"{model}, {described}; {images}, batch {wanted.batch}, {wanted.dtype}"


def _by_agreement(wanted: Wanted, place: torch.device) -> tuple[Found, str, str]:
    """The same by pictures without labels, kept in memory: half of them to search on."""
    import torch

    if not wanted.pictures:
        options.bad("IMAGES", "expected pictures or folders of them, got none.")
    if wanted.agreement is None or not 0 < wanted.agreement < 1:
        options.bad("--agreement", f"expected a number in (0, 1) such as 0.99, got {wanted.agreement}.")
    files = by_agreement.files_in(wanted.pictures)
    if len(files) < 2:
        options.bad("IMAGES", "expected at least two pictures, to search on one and report another; got one.")
    name = wanted.model
    if name is None or not name.endswith(".safetensors"):
        name = options.model_name(name, wanted.weights)
    subject, described = _load(name, wanted.weights)
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(wanted.seed)).tolist()
    expected = options.preprocessing(subject)
    search, held_out = (
        [*by_agreement.batches([files[i] for i in part], expected, wanted.batch, place, torch.float32)]
        for part in (order[::2], order[1::2])
    )
    found = _search(wanted, subject.to(place), search, held_out, agreement=wanted.agreement)
    images = f"{len(order[::2])} pictures to search on, {len(order[1::2])} others"
    return found, name, f"{name}, {described}; {images}, batch {wanted.batch}, {wanted.dtype}"


class HeldOutBatches:
    """A folder's held-out images, read anew each time."""

    def __init__(self, data: Data) -> None:
        self._data = data

    def __iter__(self) -> Iterator[Any]:
        return self._data.held_out_batches()


def _load(name: str, weights: str) -> tuple[Any, str]:
    """(the model in eval mode, sparse if it is a checkpoint; what it is in words)."""
    if name.endswith(".safetensors") or Path(name).is_file():
        if weights != "auto":
            options.bad("--weights", f"{name} has its own, got {weights}; leave it out.")
        return eval.load(name, 0, "cls", [])
    return options.load_model(name, weights)


def _search(wanted: Wanted, model: Any, images: Any, held_out: Any, **budget: Any) -> Found:
    import sait

    most = wanted.how["evaluations"]
    with options.progress() as bar:
        advance = _advance(bar, most)
        try:
            return sait.search(
                model.eval(),
                images,
                held_out,
                **budget,
                **wanted.how,
                seed=wanted.seed,
                dtype=wanted.dtype.as_torch(),
                advance=advance,
            )
        except (TypeError, ValueError) as error:
            words = options.one_line(error)
            known = {"blocks": "--block", "methods": "--method", "leave_out": "--leave-out", "groups": "--groups"}
            option = next((known[word] for word in known if f"{word}:" in words), "MODEL")
            options.bad(option, words)


def _advance(bar: Progress, most: int | None) -> Callable[[], None]:
    task = bar.add_task("searching", total=most)
    return lambda: bar.advance(task)


def table(file: PlanFile) -> Table:
    found = Table("images", title=file.plan.name, title_justify="left")
    for column in ("number", "dense", "found", "lost", "95 %"):
        found.add_column(column, justify="right")
    for name, score in (("search", file.search), ("held out", file.held_out)):
        points = [f"{100 * value:.2f}" for value in (score.lost, score.low, score.high)]
        cells = (str(score.images), f"{score.dense:.2%}", f"{score.found:.2%}", points[0])
        found.add_row(name, *cells, f"{points[1]} to {points[2]}")
    return found


def report(file: PlanFile) -> Iterator[str]:
    """What a table does not say."""
    ratio = file.dense_gmac / file.gmac
    yield (
        f"{file.gmac:.4g} GMAC in place of {file.dense_gmac:.4g}, {ratio:.2f} times fewer; {file.measure} within "
        f"{100 * file.may_lose:g} points; {file.evaluations} evaluations, seed {file.seed}"
    )
    if file.left_out:
        yield f"left out: {file.left_out}"
    if file.stopped != "done":
        yield f"stopped early ({file.stopped}): the best so far, and a longer search may find a cheaper one"
    if file.held_out.lost > file.may_lose:
        yield (
            f"On images that the search never saw it loses {100 * file.held_out.lost:.2f} points, more than the "
            "budget: the search images flatter a plan that was chosen by them. More of them (--images), "
            "--sure, or a smaller budget, help."
        )
