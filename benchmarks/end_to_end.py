"""`make end-to-end`: whole models against every peer, interleaved in one process; see benchmarks/README.md.

A peer that fails, gives wrong logits, or is not reached has a row with the reason in place of its figures. The file is
written before the first setting and after each.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import costs
import harness
import roofline
import sait
import spread
import torch
import typer
from harness import DEVICE, NOT_REACHED, ON_GPU
from parts import PARTS
from peers import AUTOTUNED, BASELINE, PEERS, Made, Setting
from rich.console import Console
from rich.table import Table
from sait import cost
from sait.bench import measure, throughput
from sait.cost import Rows
from sait_cli import options
from sait_cli.options import DType

KIND, ADAPTIVE = "end-to-end", "adaptive"
BLOCK, KEEP, MASS = 3, 0.45, 0.9  # of twelve blocks; see block_of
MODELS = ["deit_small_patch16_224"]
# Beside the adaptive ones.
ADAPTIVE_PEERS = ["timm", "openvino", "ours-mass", "ours-optimized-dense", "ours-optimized-mass"]
BATCHES = [1, 8, 64, 256] if ON_GPU else [1, 4, 16]
DTYPES = [DType.bf16] if ON_GPU else [DType.bf16, DType.fp32]
REPEATS, QUICK_REPEATS = (50, 10) if ON_GPU else (7, 3)
OUT_OF_TIME = "left out: it would have started too late"
MAKING = 0.7  # of the time of a setting: peers that would start later are left out, so that measuring has the rest
Row = dict[str, Any]


@dataclass
class TimedPeer:
    """One peer of one setting."""

    name: str
    made: Made
    rows: list[Rows]
    seconds: float = 0.0

    @property
    def tokens(self) -> float:
        return self.rows[-1].left

    def computed(self, vit: Any) -> list[Rows]:
        return cost.rows_for_head(vit, self.rows) if self.made.for_head else self.rows


def block_of(depth: int) -> int:
    """The block that prunes: at a quarter of the depth, 3 of 12 and 6 of 24."""
    return BLOCK * depth // 12


def compare(
    setting: Setting,
    names: Iterable[str],
    repeats: int,
    advance: Callable[[], object] = lambda: None,
    until: float = math.inf,
) -> tuple[list[TimedPeer], dict[str, str]]:
    """Times the peers in turn.

    Args:
        names: keys of PEERS, the baseline first. Peers that compile are made last: they take longest by far.
        advance: called once for each peer and each of its samples, for a progress bar.
        until: by time.monotonic(); a peer that has not started by then is left out.

    Returns:
        Figures of the peers that ran, in the order of names, and why the others did not.
    """
    figures, failed = prepare(setting, names, advance, until)
    calls = [partial(figure.made.forward, setting.images) for figure in figures]
    taken = measure.interleave(calls, repeats, device=DEVICE, advance=advance)
    for figure, seconds in zip(figures, taken, strict=True):
        figure.seconds = seconds
    return figures, failed


def prepare(
    setting: Setting,
    names: Iterable[str],
    advance: Callable[[], object] = lambda: None,
    until: float = math.inf,
) -> tuple[list[TimedPeer], dict[str, str]]:
    """As ``compare``, without the times: peers that have run once and whose logits are right."""
    torch._dynamo.reset()  # torch compiles a code object for a limited number of models
    names = list(names)
    figures, failed = [], {}
    check = throughput.logits_check(setting.vit, setting.images)
    check_kept = spread.kept_check(setting.vit, setting.images, setting.block)
    for name in sorted(names, key=compiles):
        if name != BASELINE and time.monotonic() > until:
            failed[name] = OUT_OF_TIME
            continue
        try:
            made = PEERS[name].make(setting)
            logits = made.forward(setting.images)
            check(logits, PEERS[name].dense is None)
            if made.kept is not None:
                check_kept(logits, made.kept)
            figures.append(TimedPeer(name, made, made.rows or seen_rows(setting, made)))
        except Exception as error:  # an engine may raise anything, and the others must still be measured
            if name == BASELINE:
                raise
            failed[name] = throughput.reason(error)
        advance()
    figures.sort(key=lambda figure: names.index(figure.name))
    return figures, failed


def compiles(name: str) -> bool:
    return name in AUTOTUNED or name.endswith("-compiled")


def seen_rows(setting: Setting, made: Made) -> list[Rows]:
    """If images decide how many: the mean number that they kept in the last forward."""
    model: Any = made.forward
    kept = [selection.cu_seqlens.diff().float().mean().item() for selection in sait.selections(model)]
    return cost.plan_rows(setting.vit, sait.Plan([sait.Stage(setting.block, mass=setting.mass)]), kept)


def rows_of(setting: Setting, figures: Sequence[TimedPeer], failed: dict[str, str], common: Row) -> list[Row]:
    """Rows of the results file; ``common`` has what they share: model, batch, dtype, weights."""
    by_name = {figure.name: figure for figure in figures}
    baseline = by_name[BASELINE]
    dense = [figure for figure in figures if PEERS[figure.name].group == "dense"]
    best = min(dense, key=lambda figure: figure.seconds)
    alike = {
        "best_pruned": [figure for figure in figures if PEERS[figure.name].same_pruning],
        "best_adaptive": [figure for figure in figures if PEERS[figure.name].adaptive],
    }
    dtype = setting.images.dtype
    roofs = roofline.Roofs(harness.measured_roofs()["copy_tbps"], harness.matmul_tflops(dtype))
    rows = []
    for figure in figures:
        peer = PEERS[figure.name]
        needed = roofline.parts(setting.vit, figure.computed(setting.vit), len(setting.images), dtype.itemsize)
        floor = roofline.floor(needed, roofs)
        row = {
            **timed_row(setting, figure, figure.seconds, baseline.seconds, common),
            "best_dense": PEERS[best.name].label,
            "vs_best_dense": round(best.seconds / figure.seconds, 3),
            "tokens": round(figure.tokens, 1),
            "gmac": round(setting.gmac(figure.rows), 3),
            "gmac_executed": round(setting.gmac(figure.computed(setting.vit)), 3),
            "floor_us": round(floor * 1e6, 1),
            "of_floor": round(floor / figure.seconds, 3),
            "floor_parts_us": {kind: round(taken * 1e6, 1) for kind, taken in roofline.by_kind(needed, roofs).items()},
        }
        for field, some in alike.items():
            if some:
                fastest = min(some, key=lambda figure: figure.seconds)
                row[field] = PEERS[fastest.name].label
                row[f"vs_{field}"] = round(fastest.seconds / figure.seconds, 3)
        if peer.in_torch is not None:
            same = [by_name[name] for name in (peer.in_torch, f"{peer.in_torch}-compiled") if name in by_name]
            if same:
                row["vs_in_torch"] = round(min(one.seconds for one in same) / figure.seconds, 3)
        if figure.made.kept is not None:
            row["kept"] = list(figure.made.kept)
        if peer.dense in by_name:
            twin = by_name[peer.dense]
            promised = setting.gmac(twin.computed(setting.vit)) / setting.gmac(figure.computed(setting.vit))
            row["flop_share"] = round(twin.seconds / figure.seconds / promised, 3)
        rows.append(row)
    return [*rows, *(failed_row(name, reason, common) for name, reason in failed.items())]


def timed_row(setting: Setting, figure: TimedPeer, seconds: float, baseline: float, common: Row) -> Row:
    """The fields of every row of a peer that ran, given its seconds and the baseline's."""
    peer = PEERS[figure.name]
    return {
        "name": "model",
        "group": peer.group,
        "peer": figure.name,
        "case": peer.label,
        "plan": figure.made.plan,
        **common,
        "baseline": PEERS[BASELINE].label,
        "ours_us": round(seconds * 1e6, 1),
        "baseline_us": round(baseline * 1e6, 1),
        "ratio": round(baseline / seconds, 3),
        "images_per_s": round(len(setting.images) / seconds, 2),
    }


def failed_row(name: str, reason: str, common: Row) -> Row:
    peer = PEERS[name]
    return {"name": "model", "group": peer.group, "peer": name, "case": peer.label, **common, "error": reason}


def add_costs(rows: Sequence[Row], setting: Setting, figures: Sequence[TimedPeer]) -> None:
    """What a forward costs besides its time; fields that a machine cannot count are absent."""
    by_name = {row["peer"]: row for row in rows}
    for figure in figures:
        try:
            found = costs.of_forward(partial(figure.made.forward, setting.images), figure.made.counted)
        except Exception as error:  # in the profiler: the times are known anyway
            print(f"{PEERS[figure.name].label}: costs not counted: {throughput.reason(error)}")
            continue
        by_name[figure.name].update(found)


def table(rows: Sequence[Row], title: str) -> Table:
    shown = Table("peer", "plan", title=title, title_justify="left")
    alike = "adaptive" if any("best_adaptive" in row for row in rows) else "pruned"
    columns = ["img/s", f"× best {alike}", "× timm eager", "× best dense", "tokens", "GMAC", "of FLOP ratio"]
    for column in (*columns, "of roofline bound", "peak MiB", *(("launches", "CPU overhead, µs") if ON_GPU else ())):
        shown.add_column(column, justify="right")
    for row in rows:
        if "error" in row:
            continue
        against = f"{row[f'vs_best_{alike}']:.2f}" if f"vs_best_{alike}" in row else ""
        cells = [f"{row['images_per_s']:.1f}", against, f"{row['ratio']:.2f}", f"{row['vs_best_dense']:.2f}"]
        cells += [f"{row['tokens']:.0f}", f"{row['gmac']:.2f}"]
        cells += [f"{row['flop_share']:.0%}" if "flop_share" in row else "", f"{row['of_floor']:.0%}"]
        cells.append(f"{row['peak_mib']:.1f}" if "peak_mib" in row else "")
        cells += [f"{row[field]:.0f}" if field in row else "" for field in ("launches", "host_us")] if ON_GPU else []
        shown.add_row(row["case"], row["plan"], *cells)
    return shown


def known(names: list[str]) -> list[str]:
    for name in names:
        if name not in PEERS:
            options.bad("--peer", f"expected some of {', '.join(PEERS)}, got {name!r}.")
    return names


def default_peers(adaptive: bool = False) -> list[str]:
    here = {name: peer for name, peer in PEERS.items() if name not in AUTOTUNED and peer.device in (None, DEVICE)}
    if adaptive:
        return [name for name, peer in here.items() if peer.adaptive or name in ADAPTIVE_PEERS]
    return [name for name, peer in here.items() if not peer.adaptive]


def load(model: str, weights: str) -> tuple[Any, str]:
    """The timm model, for images of the side after the @, if any, and its weights in words."""
    name, _, side = model.partition("@")
    loaded, described = options.load_model(name, weights)
    if side:
        if not side.isdecimal():
            options.bad("--model", f"expected a model, or model@side such as {name}@224, got {model!r}.")
        resized: Any = loaded
        resized.set_input_size((int(side), int(side)))
    return loaded, described


def main(
    models: Annotated[
        list[str],
        typer.Option(
            "--model", help=f"Any timm Vision Transformer, or <model>@<side>; repeatable; {MODELS} by default."
        ),
    ] = [],  # noqa: B006
    batches: Annotated[
        list[int], typer.Option("--batch", help=f"Images at a time; repeatable; by default {BATCHES}.", min=1)
    ] = [],  # noqa: B006
    dtypes: Annotated[list[DType], typer.Option("--dtype", help="Repeatable.")] = DTYPES,
    names: Annotated[
        list[str], typer.Option("--peer", help=f"Some of {', '.join(PEERS)}; repeatable.", callback=known)
    ] = [],  # noqa: B006
    max_autotune: Annotated[bool, typer.Option("--max-autotune", help=f"Also {' and '.join(AUTOTUNED)}.")] = False,
    adaptive: Annotated[
        bool, typer.Option("--adaptive", help="Images that keep different numbers of patches; see spread.py.")
    ] = False,
    weights: options.Weights = "random",
    repeats: Annotated[int | None, typer.Option(help=f"Samples of each; {REPEATS} by default.", min=1)] = None,
    quick: Annotated[bool, typer.Option("--quick", help=f"{QUICK_REPEATS} samples of each.")] = False,
    save: Annotated[Path | None, typer.Option("--save-results", help="Folder for the results file.")] = None,
    minutes: Annotated[
        float, typer.Option(help="Peers that would start too late for this time are left out, and named.", min=0)
    ] = math.inf,
    part: Annotated[
        str | None,
        typer.Option(
            help="Name of a run that stands beside others of the device: a file of its own. "
            f"{' and '.join(PARTS)}, without --model, are what parts.py says."
        ),
    ] = None,
) -> None:
    """Whole models against every peer: timm eager is the baseline, and always measured."""
    end = time.monotonic() + 60 * minutes
    if save is not None:
        options.make_folder(save, "--save-results")
    kind = ADAPTIVE if adaptive else KIND
    if part in PARTS and not models:
        known_part = PARTS[part]
        models, quick = [*known_part.models], quick or known_part.quick
        batches, names = batches or [*known_part.batches], names or [*known_part.peers]
    models, batches = models or MODELS, batches or BATCHES
    chosen = list(dict.fromkeys([BASELINE, *(names or default_peers(adaptive)), *(AUTOTUNED if max_autotune else ())]))
    samples = repeats or (QUICK_REPEATS if quick else REPEATS)
    console = Console(highlight=False, width=None if Console().is_terminal else 140)
    settings = [(model, dtype, batch) for model in models for dtype in dtypes for batch in batches]
    about = [{"model": model, "batch": batch, "dtype": dtype.value} for model, dtype, batch in settings]
    rows = [[failed_row(name, NOT_REACHED, common) for name in chosen] for common in about]
    head: dict[str, Any] = {"kind": kind} | ({"part": part} if part else {})
    document = measure.results([], DEVICE, **head, roofs=roofs_of(dtypes))  # before its own file changes the tree

    def keep() -> None:
        """What was measured is kept if time runs out."""
        if save is not None:
            document["rows"] = [row for found in rows for row in found]
            harness.save(document, save / measure.file_name(document))

    keep()
    whole = True
    with options.progress() as bar:
        task = bar.add_task(kind, total=len(settings) * (len(chosen) + measure.samples_in(len(chosen), samples)))
        for at, (model, dtype, batch) in enumerate(settings):
            now = time.monotonic()
            until = now + MAKING * (end - now) / (len(settings) - at)
            loaded, described = load(model, weights)
            images, _ = options.load_images(loaded, batch)
            vit = loaded.to(DEVICE, dtype.as_torch())  # outside inference mode: sait.optimize needs such weights
            images, block, counts = images.to(DEVICE, dtype.as_torch()), block_of(len(vit.blocks)), None
            if adaptive:
                images, counts = spread.uneven(vit, images, block, MASS)
            setting = Setting(vit, images, block, KEEP, MASS, counts)
            bar.update(task, description=f"{model}, {dtype}, batch {batch}")
            common = about[at] | ({"weights": "random"} if described.startswith("random") else {})
            with torch.inference_mode():
                try:
                    figures, failed = compare(setting, chosen, samples, partial(bar.advance, task), until)
                    rows[at] = rows_of(setting, figures, failed, common)
                except Exception as error:  # without its baseline a setting has no figures, but others may have theirs
                    figures, failed = [], dict.fromkeys(chosen, throughput.reason(error))
                    rows[at] = [failed_row(name, reason, common) for name, reason in failed.items()]
                    whole = False
                keep()
                add_costs(rows[at], setting, figures)
                keep()
            bar.update(task, completed=(at + 1) * bar.tasks[0].total / len(settings))  # a peer that failed has none
            console.print(table(rows[at], f"{model}, {dtype}, batch {batch}, {described}"))
            for name, reason in failed.items():
                console.print(f"{PEERS[name].label}: no figures: {reason}")
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    console.print(f"{document['device']}, {document['threads']} threads; {versions}; roofs {document['roofs']}")
    if save is not None:
        console.print(f"written: {save / measure.file_name(document)}")
    if not whole:
        raise typer.Exit(1)


def roofs_of(dtypes: Sequence[DType]) -> dict[str, float]:
    more = {"matmul_tflops_fp32": harness.matmul_tflops(torch.float32)} if DType.fp32 in dtypes else {}
    return harness.measured_roofs() | more


if __name__ == "__main__":
    typer.run(main)
