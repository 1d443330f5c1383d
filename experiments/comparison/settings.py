"""How large the comparison is, and which methods are in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sait import Plan, methods

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "checkpoints" / "plain-canvas.safetensors"  # the dense-trained model that all start from
SAVED = (0.25, 0.40, 0.55)  # of the dense model's multiply-adds
DEPTH = 8  # of the model
DENSE = "dense"  # the variant that drops nothing
SHARES = [round(share / 200, 3) for share in range(4, 200)]


@dataclass(frozen=True)
class TunedMethod:
    """One method, with one setting that decides how much it computes.

    Attributes:
        plan: makes the plan of a setting, as an untrained model runs it.
        settings: those to choose from, from the least arithmetic to the most.
        config: keys of sait.train.Config for a setting.
        by_image: whether the images decide how many tokens stay, so that training changes the arithmetic of a setting;
            for the trained model it is chosen again.
    """

    name: str
    plan: Callable[[Any], Plan]
    settings: Sequence[Any]
    config: Callable[[Any], dict[str, Any]]
    by_image: bool = False


LEARNS = {"lr": 3e-3}  # for new parts; the rest of the model learns at 0.1 times that, as in TUNING


def of_method(name: str, **more: Any) -> Callable[[Any], dict[str, Any]]:
    """A published method, trained by its plan; the setting is a share."""
    return lambda share: {"method": name, "keep": share, **more}


def of_kwargs(name: str, argument: str, **more: Any) -> Callable[[Any], dict[str, Any]]:
    """The same, with another argument of the method's call as the setting."""
    return lambda value: {"method": name, "keep": None, "method_kwargs": {argument: value}, **more}


THRESHOLDS = [round(0.2 * 0.96**i, 6) for i in range(160)]
METHODS = (
    # Its own training: alternating dense and sparse epochs, and distillation of attention.
    TunedMethod("SaiT", methods.sait, SHARES, lambda share: {"keep": share, "teacher": str(CHECKPOINT)}),
    TunedMethod(
        "SaiT, mass",
        lambda mass: methods.sait(mass=mass),
        SHARES,
        lambda mass: {"keep": None, "mass": mass, "teacher": str(CHECKPOINT)},
        by_image=True,
    ),
    TunedMethod("SaiT, no teacher", methods.sait, SHARES, lambda share: {"keep": share}),
    TunedMethod("SaiT, sparse only", methods.sait, SHARES, of_method("sait")),
    TunedMethod("EViT", methods.evit, SHARES, of_method("evit")),
    # Drops a lot if it is not limited: it may start from later blocks.
    TunedMethod(
        "ATS",
        lambda setting: methods.ats(*setting),
        [*((keep, None) for keep in SHARES), *((1.0, tuple(range(block, DEPTH))) for block in range(2, DEPTH))],
        lambda setting: {"method": "ats", "keep": setting[0], "blocks": setting[1] and list(setting[1])},
        by_image=True,
    ),
    TunedMethod("LTP", methods.ltp, THRESHOLDS, of_kwargs("ltp", "threshold"), by_image=True),
    TunedMethod("LTP, learned", methods.ltp, THRESHOLDS, of_kwargs("ltp_learned", "threshold", **LEARNS)),
    TunedMethod("ToMe", methods.tome, list(range(32, 0, -1)), of_kwargs("tome", "r")),
    TunedMethod("DynamicViT", methods.dynamicvit, SHARES, of_method("dynamicvit", **LEARNS)),
    TunedMethod("AdaViT", methods.adavit, SHARES, of_method("adavit", **LEARNS)),
    TunedMethod("CageViT", methods.cagevit, SHARES, of_method("cagevit", **LEARNS)),
    TunedMethod("random", methods.random, SHARES, of_method("random")),
)


@dataclass(frozen=True)
class Settings:
    """One size of the comparison.

    Attributes:
        seeds: of each method at each of ``saved``.
        tuning: keys of sait.train.Config of every fine-tuning: the budget.
        test_images: the same for every model.
        sample: test images on which a setting's arithmetic is counted.
        repeats: samples of each time.
    """

    seeds: int = 3
    saved: tuple[float, ...] = SAVED
    methods: tuple[str, ...] = tuple(method.name for method in METHODS)
    tuning: dict[str, Any] = field(default_factory=dict)
    test_images: int = 2000
    sample: int = 64
    repeats: int = 10


TUNING: dict[str, Any] = {
    "model": "vit_tiny_patch16_224",
    "model_kwargs": {"img_size": 64, "patch_size": 8, "embed_dim": 128, "depth": DEPTH, "num_heads": 4},
    "data": "canvas",
    "block": 2,
    "init": str(CHECKPOINT),
    "epochs": 4,
    "canvas_images": 2000,
    "canvas_eval_images": 200,
    "batch": 32,
    "lr": 3e-4,
    "warmup_epochs": 0.5,
    "min_lr": 1e-6,
    "weight_decay": 0.05,
    "backbone_scale": 0.1,  # of LEARNS
    "smoothing": 0.1,
    "amp": "none",
    "eval_every": 100,  # the last epoch only
    "workers": 0,
}
FULL = Settings(tuning=TUNING)
QUICK = replace(
    FULL,
    seeds=1,
    saved=(0.40,),
    methods=("SaiT", "ToMe", "LTP, learned", "DynamicViT", "AdaViT", "CageViT"),
    tuning={**TUNING, "epochs": 2, "canvas_images": 32, "canvas_eval_images": 16, "batch": 16},
    test_images=16,
    sample=4,
    repeats=1,
)


def method_of(name: str) -> TunedMethod:
    return next(method for method in METHODS if method.name == name)


def name_of(method: str, saved: float) -> str:
    """The variant of a method that saves a share of the multiply-adds."""
    return f"{method}, -{saved:.0%}"
