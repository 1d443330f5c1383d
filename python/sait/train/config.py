"""Config: all that decides a training, from a YAML file and the command line."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sait.methods import PUBLISHED
from sait.methods.plan import Plan, Stage

MODES = ("alternate", "dense", "sparse")
AMP = ("none", "bf16")
SHIPPED = Path(__file__).with_name("configs")
CANVAS_MODEL = {"img_size": 64, "patch_size": 8}
Range = float | list[float] | None


class TrainingError(RuntimeError):
    """Why a training cannot run as it is asked to; the message is one line that says what to do."""


class StoppedError(TrainingError):
    """Why a training that was asked for rightly cannot go on."""


@dataclass(frozen=True)
class Config:
    """One training run.

    The method (see docs/training.md): in mode "alternate" odd epochs are dense and even ones sparse, counted from 1.
    The loss is that of the labels + alpha * KL(teacher's attention || student's scores at ``block``), in both.

    Attributes:
        model, model_kwargs: for timm.create_model; num_classes is set by the data, and canvas, whose images are small,
            has an img_size of 64 and a patch_size of 8 where these say nothing.
        init: a checkpoint whose weights to start from.
        data: a folder with train/ and val/, a folder for each class in both; or "canvas" or "stamps".
        canvas_images, canvas_eval_images: images of an epoch and of the held-out set, for "canvas".
        stamps_images, stamps_eval_images: the same for "stamps".
        fold: for "stamps": which fifth of the objects is the test's.
        out: the folder for checkpoints and metrics.

        mode: "alternate" (SaiT), "dense" (plain training) or "sparse".
        block, score: where tokens are scored and dropped, and by which score; as in sait.Plan.
        keep: share of the patches in sparse epochs, or a pair to draw from uniformly for each batch.
        mass: the same for the cumulative score (top-p). One of the two is given.
        max_keep, static: as in sait.Stage, with mass: of sparse epochs, of the saved model, and of eval_mass.

        method: a published method of sait.methods in place of SaiT's epochs: each step trains its plan, with its own
            losses. Of the lines above keep alone counts, one share, or none for the method's own; nor does alpha.
        blocks: where the method drops tokens; none: its own.
        method_kwargs: what the method's call takes beside keep and blocks.
        backbone_scale: with a method that learns parts of its own: the learning rate of all else times this.

        teacher: a checkpoint of ours, or the name of a timm model with pretrained weights; none: no distillation.
        alpha: weight of the distillation of attention; 0 turns it off.
        teacher_blocks: over how many of the teacher's last blocks its class attention is averaged.
        logit_alpha: weight of the distillation of logits, KL at ``temperature``.
        manifold_alpha: weight of manifold distillation (2107.01378) of the last features; with keep, not with mass.

        batch: images of a step, over all processes together.
        opt, lr, weight_decay, clip: optimizer of timm, learning rate, weight decay, greatest gradient norm.
        layer_decay: each block's learning rate is that of the next one times this; none: one rate for all.
        sched, warmup_epochs, warmup_lr, min_lr: learning rate schedule of timm, updated every step.
        ema: decay of the average of the weights that is evaluated and saved; none: the weights themselves.
        drop_path, smoothing: stochastic depth and label smoothing.
        mixup, cutmix: their alpha; 0 is off.
        auto_augment, color_jitter, random_erasing, crop_scale: of timm, for image folders.
        amp: "bf16" autocast or "none".

        eval_keep, eval_mass: densities that each epoch is evaluated at, beside dense.
        eval_every: epochs between two evaluations; the last epoch always has one.
        seed, device, workers: workers are processes that load images, for image folders.
        tensorboard: also write event files.
    """

    model: str = "vit_tiny_patch16_224"
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    init: str | None = None
    data: str = "canvas"
    canvas_images: int = 20_000
    canvas_eval_images: int = 2_000
    stamps_images: int = 1_500
    stamps_eval_images: int = 520
    fold: int = 0
    out: str = "runs/sait"

    mode: str = "alternate"
    block: int = 3
    score: str = "cls"
    keep: Range = None
    mass: Range = None
    max_keep: int | None = None
    static: bool = False
    method: str | None = None
    blocks: list[int] | None = None
    method_kwargs: dict[str, Any] = field(default_factory=dict)
    backbone_scale: float = 0.01

    teacher: str | None = None
    alpha: float = 1.0
    teacher_blocks: int = 1
    logit_alpha: float = 0.0
    temperature: float = 1.0
    manifold_alpha: float = 0.0

    epochs: int = 10
    batch: int = 128
    opt: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    clip: float | None = 1.0
    layer_decay: float | None = None
    sched: str = "cosine"
    warmup_epochs: float = 1.0
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    ema: float | None = None
    drop_path: float = 0.0
    smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    auto_augment: str | None = None
    color_jitter: float = 0.0
    random_erasing: float = 0.0
    crop_scale: list[float] = field(default_factory=lambda: [0.08, 1.0])
    amp: str = "none"

    eval_keep: list[float] = field(default_factory=lambda: [0.45])
    eval_mass: list[float] = field(default_factory=list)
    eval_every: int = 1
    seed: int = 0
    device: str = "cpu"
    workers: int = 4
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            _check_type(option.name, getattr(self, option.name), _TYPES[option.name])
        if self.data == "canvas":
            object.__setattr__(self, "model_kwargs", CANVAS_MODEL | self.model_kwargs)
        _one_of("mode", self.mode, MODES)
        _one_of("amp", self.amp, AMP)
        if self.method is not None:
            self._check_method(self.method)
        elif self.blocks is not None:
            raise TrainingError("config: blocks: there is no method that takes them; name one, or set block.")
        elif self.method_kwargs:
            raise TrainingError("config: method_kwargs: there is no method that takes them; name one.")
        elif self.mass is None and self.keep is None:
            object.__setattr__(self, "keep", 0.45)
        object.__setattr__(self, "keep", _as_shares("keep", self.keep))
        object.__setattr__(self, "eval_keep", _as_shares("eval_keep", self.eval_keep))
        try:
            for share in (*_ends(self.keep), *_ends(self.mass)):
                Stage(self.block, *((share, None) if self.mass is None else (None, share)), **self.limits)
            for share in self.eval_keep:
                Stage(0, keep=share)
            for share in self.eval_mass:
                Stage(0, mass=share, **self.limits)
            Plan((Stage(self.block, keep=1.0),), self.score)
        except (TypeError, ValueError) as error:
            raise TrainingError(f"config: {error}") from error
        if self.keep is not None and self.mass is not None:
            raise TrainingError("config: expected one of keep and mass, got both; set the other to null.")
        counts = ("epochs", "batch", "teacher_blocks", "eval_every")
        sizes = ("canvas_images", "canvas_eval_images", "stamps_images", "stamps_eval_images")
        for name in (*counts, *sizes):
            if getattr(self, name) < 1:
                raise TrainingError(f"config: {name}: expected 1 or more, got {getattr(self, name)}.")
        if (self.mixup or self.cutmix) and self.batch % 2:
            raise TrainingError(
                f"config: batch: mixup and cutmix pair images, so expected an even number, got {self.batch}."
            )
        if len(self.crop_scale) != 2:
            raise TrainingError(f"config: crop_scale: expected [least, greatest], got {self.crop_scale}.")
        for name in ("logit_alpha", "manifold_alpha"):
            if getattr(self, name) and self.teacher is None:
                raise TrainingError(f"config: {name}: there is no teacher; name one, or set it to 0.")
        if self.manifold_alpha and self.mass is not None:
            raise TrainingError("config: manifold_alpha: expected keep, for with mass images keep different numbers.")

    def _check_method(self, method: str) -> None:
        _one_of("method", method, tuple(PUBLISHED))
        if self.mode == "dense":
            raise TrainingError(
                "config: mode: expected alternate or sparse with a method, got dense; leave method out."
            )
        if self.mass is not None or isinstance(self.keep, list):
            found = f"mass={self.mass}" if self.mass is not None else f"keep={self.keep}"
            raise TrainingError(f"config: keep: expected one share with a method, such as keep=0.7, got {found}.")
        if not 0 <= self.backbone_scale <= 1:
            raise TrainingError(f"config: backbone_scale: expected a number from 0 to 1, got {self.backbone_scale}.")
        if self.manifold_alpha:
            raise TrainingError("config: manifold_alpha: expected 0 with a method, which has losses of its own.")
        try:
            plan = PUBLISHED[method](**self.of_method)
        except (TypeError, ValueError) as error:
            raise TrainingError(f"config: method: {method}: {error}") from error
        if plan.keeps_all:
            raise TrainingError("config: keep: expected less than 1.0 with a method, for that drops nothing.")

    @property
    def of_method(self) -> dict[str, Any]:
        """What the method's call takes."""
        given = {"keep": _as_shares("keep", self.keep), "blocks": self.blocks}
        return {name: value for name, value in given.items() if value is not None} | self.method_kwargs

    @property
    def density(self) -> tuple[str, list[float]]:
        """("keep" or "mass", [least, greatest])."""
        return ("keep", _ends(self.keep)) if self.mass is None else ("mass", _ends(self.mass))

    @property
    def limits(self) -> dict[str, Any]:
        """What a Stage takes beside the density."""
        return {"max_keep": self.max_keep, "static": self.static}

    @property
    def learns_attention(self) -> bool:
        return self.teacher is not None and self.alpha > 0 and self.method is None

    @property
    def learns_from_dense_tokens(self) -> bool:
        """Whether a dense step needs the scores or the tokens of the stage. It runs keep=1.0 then: all tokens, by the
        attention of sait_kernels. Else it is the model's own forward."""
        return self.learns_attention or self.manifold_alpha > 0

    @property
    def method_learns_from_teacher(self) -> bool:
        losses = None if self.method is None else PUBLISHED[self.method](**self.of_method).losses
        return losses is not None and losses.needs_teacher

    @property
    def needs_teacher(self) -> bool:
        of_config = self.learns_attention or self.logit_alpha > 0 or self.manifold_alpha > 0
        return of_config or self.method_learns_from_teacher

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


_TYPES = typing.get_type_hints(Config)


def shipped() -> list[str]:
    """Names of the configs that the package brings along."""
    return sorted(file.stem for file in SHIPPED.glob("*.yaml"))


def read_config(path: str | Path | None, changes: Mapping[str, Any]) -> Config:
    """The config of a YAML file, of one of `shipped` by its name, or the default one, with changes.

    Raises:
        TrainingError: the file cannot be read, is no mapping, or has a key that there is not or a value of a wrong
            type.
    """
    values: dict[str, Any] = {}
    if path is not None:
        named = Path(path)
        if str(path) in shipped() and not named.is_file():
            named = SHIPPED / f"{path}.yaml"
        try:
            found = yaml.safe_load(named.read_text(encoding="utf-8"))
        except OSError as error:
            message = f"config: cannot read {path}: {error.strerror}. Known by name: {', '.join(shipped())}."
            raise TrainingError(message) from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise TrainingError(f"config: {path} is no YAML: {' '.join(str(error).split())}") from error
        if not isinstance(found, dict):
            raise TrainingError(f"config: {path}: expected lines of `key: value`.")
        values = found
    if "keep" in changes and "mass" not in changes:
        values |= {"mass": None, "max_keep": None, "static": False}  # a share has none of the file's limits of a mass
    values = {**values, **changes}
    if "mass" in changes and "keep" not in changes:
        values["keep"] = None
    return from_dict(values, str(path) if path is not None else "config")


def from_dict(values: Mapping[str, Any], where: str) -> Config:
    for key in values:
        if key not in _TYPES:
            near = difflib.get_close_matches(str(key), _TYPES, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(_TYPES)}."
            raise TrainingError(f"{where}: there is no key {key!r}{hint}")
    return Config(**{key: _number(value, _TYPES[key]) for key, value in values.items()})


def parse_change(text: str) -> tuple[str, Any]:
    """``key=value`` of the command line, the value in YAML: lr=1e-3, keep=[0.3, 0.7], ema=null."""
    key, equals, value = text.partition("=")
    if not equals:
        raise TrainingError(f"--set: expected key=value such as lr=0.001, got {text!r}.")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise TrainingError(f"--set: {key}: {value!r} is no YAML value.") from error


def _number(value: Any, hint: Any) -> Any:
    """YAML 1.1 takes 1e-3, without a point, for a string; where a number belongs it is one."""
    if isinstance(value, str) and float in (hint, *typing.get_args(hint)):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def _check_type(name: str, value: Any, hint: Any) -> None:
    """TrainingError unless the value is of the annotated type; an int serves as a float, and a bool as neither."""
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind in allowed:
        origin, parts = typing.get_origin(kind) or kind, typing.get_args(kind)
        if origin is float and _is_number(value):
            return
        if origin is list and isinstance(value, list) and all(_is_number(part) for part in value):
            return
        fits = origin not in (float, list) and isinstance(value, origin) and (origin is bool) == isinstance(value, bool)
        if fits and (not parts or all(isinstance(key, str) for key in value)):
            return
    wanted = " or ".join("null" if kind is type(None) else getattr(kind, "__name__", str(kind)) for kind in allowed)
    raise TrainingError(f"config: {name}: expected {wanted}, got {value!r}.")


def _as_shares(name: str, value: Any) -> Any:
    """In a file keep is always a share, and 1 is 1.0: in Python the int 1 would be one patch."""
    if isinstance(value, list):
        return [_as_shares(name, part) for part in value]
    if isinstance(value, int) and value != 1:
        raise TrainingError(
            f"config: {name}: expected a share in (0, 1], got {value}; write one such as 0.45. "
            "A number of patches is for Python: sait.set_density(model, keep=100)."
        )
    return float(value) if isinstance(value, int) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise TrainingError(f"config: {name}: expected one of {', '.join(allowed)}, got {value!r}.")


def _ends(share: Range) -> list[float]:
    if share is None:
        return []
    ends = [float(value) for value in (share if isinstance(share, list) else [share, share])]
    if len(ends) != 2 or ends[0] > ends[1]:
        raise TrainingError(f"config: keep or mass: expected a number or [least, greatest], got {share}.")
    return ends
