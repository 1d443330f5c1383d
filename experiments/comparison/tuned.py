"""One fine-tuning: choose the setting with the wanted arithmetic, train, and measure on test images."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sait
import torch
from intervals import pack
from methods import closest
from recorded import Row
from sait import checkpoint
from sait.bench.plain import share
from sait.cost import macs
from sait.data import Canvas
from sait.train import train
from sait.train.config import Config, from_dict
from sait.train.processes import Processes
from sait.train.trainer import MODEL
from torch import Tensor

from comparison.settings import CHECKPOINT, DENSE, DEPTH, Settings, TunedMethod, method_of

ALONE = Processes(0, 1, torch.device("cpu"))
BATCH = 64


def rows(variant: str, seed: int, settings: Settings, runs: Path) -> Iterator[Row]:
    """Trains a variant and measures it: dense, and by its plan.

    Args:
        variant: "dense", or the name of a method and its saving, as ``name_of`` writes it.
        runs: folder of the trainings.
    """
    model, known = sait.load(trained(variant, seed, settings, runs)), told(variant, settings)
    own = None if variant == DENSE else sait.density(model)
    sait.set_density(model)
    yield {"case": DENSE, **known, **measured(model, settings)}
    if own is None:
        return
    sait.set_density(model, own)
    as_trained = measured(model, settings)
    setting = retune(model, known, settings.sample)
    if setting == known["setting"]:
        yield {"case": "pruned", **known, **as_trained}
    else:
        yield {"case": "as trained", **known, **as_trained}
        yield {"case": "pruned", **known, "setting": setting, **measured(model, settings)}


def retune(model: Any, known: Row, sample: int) -> Any:
    """Changes a trained model to the plan by which it is measured, and returns the setting of that plan.

    That is the plan it was trained with, unless images decide how many tokens stay.
    """
    method = method_of(known["method"])
    if not method.by_image:
        return known["setting"]
    setting = chosen(method, sait.restore(share(model)), known["saved"], sample)
    sait.sparsify(model, method.plan(setting).for_depth(DEPTH))
    return setting


def told(variant: str, settings: Settings) -> Row:
    """The method of a variant, the wanted saving, and the setting for it."""
    if variant == DENSE:
        return {"method": DENSE}
    name, _, saved = variant.rpartition(", -")
    wanted = int(saved.rstrip("%")) / 100
    return {"method": name, "saved": wanted, "setting": setting_of(name, wanted, settings.sample)}


def trained(variant: str, seed: int, settings: Settings, runs: Path) -> Path:
    """The checkpoint after the last epoch. An interrupted training starts again: it takes a minute."""
    config = config_of(variant, seed, settings, runs)
    path = Path(config.out) / MODEL
    if path.exists() and checkpoint.read(path).metadata["metrics"][-1]["epoch"] == config.epochs:
        return path
    shutil.rmtree(config.out, ignore_errors=True)
    return train(config, ALONE, command=f"comparison --only comparison/{variant}/{seed}")


def config_of(variant: str, seed: int, settings: Settings, runs: Path) -> Config:
    folder = runs / f"{variant.replace(', ', '-').replace(' ', '-').replace('%', '')}-{seed}"
    fixed: dict[str, Any] = {**settings.tuning, "out": str(folder), "seed": seed}
    found = told(variant, settings)
    more = {"mode": DENSE} if variant == DENSE else method_of(found["method"]).config(found["setting"])
    return from_dict({**fixed, **more}, "comparison")


@functools.cache
def setting_of(name: str, saved: float, sample: int) -> Any:
    """The setting that a method is trained with: chosen for the model before fine-tuning."""
    return chosen(method_of(name), sait.restore(sait.load(CHECKPOINT)).eval(), saved, sample)


def chosen(method: TunedMethod, model: Any, saved: float, sample: int) -> Any:
    """The setting whose multiply-adds, on a plain model, are closest to those wanted."""
    images, _ = pictures(sample)
    return closest(method.settings, functools.partial(cost_of, method, model, images), (1 - saved) * macs(model))


@torch.inference_mode()
def cost_of(method: TunedMethod, model: Any, images: Tensor, setting: Any) -> float:
    plan = method.plan(setting)
    try:
        sparse = sait.sparsify(share(model), plan)
    except ValueError:  # more pairs than the model has
        return 0.0
    plan = sparse._sait.plan
    if plan.gated:
        return macs(sparse, usage=setting)
    if plan.ragged:
        sparse(images)
    return macs(sparse)


@functools.cache
def pictures(count: int) -> tuple[Tensor, Tensor]:
    """Test images, the same for every model, and their labels."""
    return Canvas("test", count, img_size=64).batch(range(count))


@torch.inference_mode()
def measured(model: Any, settings: Settings) -> Row:
    images, labels = pictures(settings.test_images)
    torch.manual_seed(0)  # of chance
    right, cost, tokens = [], 0.0, 0.0
    for some, wanted in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        right.append(model(some).argmax(1) == wanted)
        cost += macs(model) * len(some)
        kept = sait.selections(model)
        tokens += kept[-1].cu_seqlens[-1].item() if kept else len(some) * (images.shape[-1] // 8) ** 2 + len(some)
    found = torch.cat(right).numpy()
    return {
        "accuracy": round(float(found.mean()), 5),
        "images": len(found),
        "gmac": round(cost / len(found) / 1e9, 5),
        "tokens": round(tokens / len(found), 2),
        "right": pack(found),
    }
