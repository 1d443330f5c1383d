"""Methods that need no training, at the same arithmetic: accuracy or cosine, tokens and speed; writes docs/methods.md.

``python experiments/methods.py`` or ``make methods``; half an hour on two cores. The quality is accuracy for the canvas
checkpoint, and for trained DINOv2-S the cosine between its class token and the dense model's, on crops of photographs.
Without the packages of sait.weights and sait.data.debian it measures only canvas, and says so.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import methods_report
import sait
import torch
import torch.nn.functional as F
from rich.console import Console
from sait import Plan, methods, weights
from sait.bench import measure
from sait.bench.plain import share
from sait.cost import macs
from sait.data import Canvas
from sait.data.debian import PackageError
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "checkpoints" / "sait-canvas.safetensors"
SAVED = (0.25, 0.40, 0.55)  # of the dense model's multiply-accumulates
TOLERANCE = 0.03  # a setting further from the wanted saving is not shown
BATCH = 16
SAMPLE = 64  # images to find the setting of a method whose counts depend on the images
Row = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """A method with one setting, which decides how much it computes.

    Attributes:
        plan: makes the plan of a setting.
        settings: those to try, from the least arithmetic to the most.
    """

    name: str
    plan: Callable[[Any], Plan]
    settings: Sequence[Any]


SHARES = [round(share_ / 200, 3) for share_ in range(4, 201)]


def methods_of(depth: int) -> list[Method]:
    """The methods to measure, for a model with so many blocks."""
    later = [(1.0, tuple(range(block, depth))) for block in range(depth // 4 + 1, depth)]
    return [
        Method("SaiT, cls", methods.sait, SHARES),
        Method("SaiT, column", partial(methods.sait, score="column"), SHARES),
        Method("SaiT, mass", lambda mass: methods.sait(mass=mass), SHARES),
        Method("EViT", methods.evit, SHARES),
        # Drops a lot if it is not limited: it may start from later blocks.
        Method("ATS", lambda setting: methods.ats(*setting), [*((keep, None) for keep in SHARES), *later]),
        Method("LTP", methods.ltp, [round(0.1 * 0.96**i, 6) for i in range(160)]),
        Method("ToMe", methods.tome, list(range(128, 0, -1))),
        Method("random", methods.random, SHARES),
    ]


@dataclass
class ComparedModel:
    """A model, and a measure of the quality of its results.

    Attributes:
        images: (n, 3, height, width).
        quality: "accuracy" or "cosine".
        score: results of the images -> (n,) float, each image's share in the quality.
    """

    name: str
    model: Any
    images: Tensor
    quality: str
    score: Callable[[Tensor], Tensor]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of tables, plots and figures")
    parser.add_argument("--images", type=int, default=2000, help="test images of canvas")
    parser.add_argument("--repeats", type=int, default=5, help="samples of each time")
    parser.add_argument("--canvas-only", action="store_true")
    parser.add_argument(
        "--times", action="store_true", help="measure only the times again, of the settings that are there"
    )
    parser.add_argument("--report", action="store_true", help="only write the report again")
    options = parser.parse_args(arguments)
    path = options.out / "methods.json"
    if not options.report:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if options.times else {}
        rows: list[Row] = document.get("rows", [])
        for subject in subjects(options.images, options.canvas_only):
            if options.times:
                add_times([row for row in rows if row["subject"] == subject.name], subject, options.repeats)
                continue
            rows += measured(subject, options.repeats)
            rows += twin_rows(subject)
        options.out.mkdir(parents=True, exist_ok=True)
        if options.times:
            now = measure.results([])
            document |= {"rows": rows, "times": {key: now.get(key) for key in ("date", "commit", "dirty")}}
        else:
            trained = sait.load(CHECKPOINT)
            document = measure.results(rows, trained_block=sait.density(trained).stages[0].block)
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    methods_report.write(json.loads(path.read_text(encoding="utf-8")), options.out)


def subjects(images: int, canvas_only: bool) -> Iterator[ComparedModel]:
    model = sait.restore(sait.load(CHECKPOINT)).eval()
    canvas = Canvas("test", images, img_size=model.patch_embed.img_size[0])
    pictures, labels = canvas.batch(range(images))
    yield ComparedModel("canvas", model, pictures, "accuracy", lambda logits: (logits.argmax(1) == labels).double())
    if canvas_only:
        return
    from photographs.untrained import crops_of

    try:
        crops, _ = crops_of(224, None)
        model = weights.load(weights.obtain(), img_size=224).eval()
    except (PackageError, weights.WeightsError) as error:
        Console(stderr=True).print(f"methods: photographs are left out: {error}")
        return
    dense = results(model, crops)
    yield ComparedModel(
        "photographs", model, crops, "cosine", lambda got: F.cosine_similarity(got.double(), dense.double())
    )


@torch.inference_mode()
def results(model: Any, images: Tensor) -> Tensor:
    return torch.cat([model(some) for some in images.split(4 * BATCH)])


def measured(subject: ComparedModel, repeats: int) -> Iterator[Row]:
    """Every method at each of SAVED, and the dense model first."""
    dense, console = macs(subject.model, img_size=side(subject)), Console(stderr=True)
    found: list[Row] = [row_of(subject, "dense", None, results(subject.model, subject.images), dense, [])]
    for method in methods_of(len(subject.model.blocks)):
        for saved in SAVED:
            plan = setting_for(method, subject, (1 - saved) * dense)
            torch.manual_seed(0)  # of chance
            model = running(subject, plan)
            got, costs, counts = [], 0.0, []
            for some in subject.images.split(4 * BATCH):
                got.append(results(model, some))
                costs += macs(model, img_size=side(subject)) * len(some)
                counts.append(sait.selections(model)[-1].cu_seqlens.diff())
            cost = costs / len(subject.images)
            if abs(1 - cost / dense - saved) > TOLERANCE:
                found.append({"name": "methods", "subject": subject.name, "method": method.name, "saved": saved})
                found[-1]["error"] = f"saves {1 - cost / dense:.0%} at {plan.label}, and no setting is closer"
                continue
            found.append(row_of(subject, method.name, plan, torch.cat(got), cost, counts) | {"saved": saved})
            console.print(f"{subject.name}, {plan.label}: {found[-1][subject.quality]:.4f}", highlight=False)
    add_times(found, subject, repeats)
    return iter(found)


def add_times(rows: Sequence[Row], subject: ComparedModel, repeats: int) -> None:
    """Images a second of the rows' settings, all measured together."""
    every = {method.name: method for method in methods_of(len(subject.model.blocks))}
    shown = [row for row in rows if row["name"] == "methods" and "error" not in row]
    plans = []
    for row in shown[1:]:
        method = every[row["method"]]
        plans.append(next(plan for plan in map(method.plan, method.settings) if plan.label == row["case"]))
    for dtype in (torch.float32, torch.bfloat16):
        key = "fp32" if dtype == torch.float32 else "bf16"
        for row, rate in zip(shown, rates(subject, plans, dtype, repeats), strict=True):
            row[f"images_per_s_{key}"] = rate


def row_of(
    subject: ComparedModel, method: str, plan: Plan | None, got: Tensor, cost: float, counts: Sequence[Tensor]
) -> Row:
    scores = subject.score(got)
    row: Row = {
        "name": "methods",
        "subject": subject.name,
        "method": method,
        "case": "dense" if plan is None else str(plan.label),
        "images": len(scores),
        subject.quality: round(scores.mean().item(), 5),
        "standard_error": round(scores.std().item() / len(scores) ** 0.5, 5),
        "gmac": round(cost / 1e9, 5),
    }
    if counts:
        row["tokens"] = round(torch.cat(list(counts)).double().mean().item(), 2)  # behind the last stage
    return row


def setting_for(method: Method, subject: ComparedModel, wanted: float) -> Plan:
    """The plan whose multiply-accumulates are closest to those wanted, by bisection over the method's settings."""

    @torch.inference_mode()
    def cost(setting: Any) -> float:
        plan = method.plan(setting)
        try:
            model = sait.sparsify(share(subject.model), plan)
        except ValueError:  # more pairs than the model has
            return 0.0
        if plan.ragged:
            model(subject.images[:SAMPLE])
        return macs(model, img_size=side(subject))

    return method.plan(closest(method.settings, cost, wanted))


def closest(settings: Sequence[Any], cost: Callable[[Any], float], wanted: float) -> Any:
    """The setting whose cost is closest to the wanted one; costs ascend with the settings."""
    low, high = 0, len(settings) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(settings[middle]) < wanted else (low, middle)
    return min((settings[low], settings[high]), key=lambda setting: abs(cost(setting) - wanted))


def running(subject: ComparedModel, plan: Plan | None, dtype: torch.dtype = torch.float32) -> Any:
    """A separate model with sait.optimize; for None the dense one, with all tokens through the kernels."""
    model = share(subject.model) if dtype == torch.float32 else copy.deepcopy(subject.model).to(dtype)
    return sait.optimize(sait.sparsify(model, methods.sait(1.0) if plan is None else plan))


@torch.inference_mode()
def rates(subject: ComparedModel, plans: Sequence[Plan], dtype: torch.dtype, repeats: int) -> list[float]:
    """Images a second of the dense model and of each plan, on one batch, interleaved."""
    images = subject.images[:BATCH].to(dtype)
    calls = [partial(running(subject, plan, dtype), images) for plan in (None, *plans)]
    return [round(BATCH / seconds, 2) for seconds in measure.interleave(calls, repeats)]


def twin_rows(subject: ComparedModel) -> Iterator[Row]:
    """The errors of ours, and of its twin in plain torch in float32, against the twin in float64, relative to the
    largest result."""
    sys.path.insert(0, str(ROOT / "tests" / "models"))
    import twins

    prefix, depth = subject.model.num_prefix_tokens, len(subject.model.blocks)
    threshold, r = 0.006, 3 if subject.name == "canvas" else 13
    quarters, later = (depth // 4, depth // 2, 3 * depth // 4), range(depth // 4, depth)
    cases = {
        "EViT": (methods.evit(0.7), dict.fromkeys(quarters, twins.evit(prefix, 0.7))),
        "ATS": (methods.ats(), dict.fromkeys(later, twins.ats(prefix, 1.0))),
        "LTP": (
            methods.ltp(threshold),
            {i: twins.ltp(prefix, threshold * (i + 1) / depth) for i in range(depth)},
        ),
        "ToMe": (methods.tome(r), dict.fromkeys(range(depth), twins.tome(prefix, r))),
    }
    images = subject.images[:4]
    with torch.inference_mode():
        for name, (plan, twin) in cases.items():
            exact, counts = twins.forward(copy.deepcopy(subject.model).double(), images.double(), twin)
            in_torch, _ = twins.forward(subject.model, images, twin)
            model = sait.sparsify(share(subject.model), plan)
            ours = model(images)
            kept = [selection.cu_seqlens.diff().tolist() for selection in sait.selections(model)]
            stages = [stage.block for stage in plan.for_depth(depth).stages]
            yield {
                "name": "twin",
                "subject": subject.name,
                "method": name,
                "ours": far(ours, exact),
                "in_torch": far(in_torch, exact),
                "same_counts": [list(of) for of in zip(*kept, strict=True)] == [[c[b] for b in stages] for c in counts],
            }


def far(got: Tensor, exact: Tensor) -> float:
    return float(f"{((got.double() - exact).abs().max() / exact.abs().max()).item():.2g}")


def side(subject: ComparedModel) -> tuple[int, int]:
    return subject.images.shape[-2], subject.images.shape[-1]


if __name__ == "__main__":
    main()
