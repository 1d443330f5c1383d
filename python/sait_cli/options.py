"""What the commands share: option types, and the checks that turn a bad argument into one line that helps."""

from __future__ import annotations

import contextlib
import difflib
import http.client
import os
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from sait.data.photos import Preprocessing
    from sait.state import Density
    from torch import Tensor, nn

HUB_SECONDS = 5.0


class DType(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"

    def as_torch(self) -> torch.dtype:
        import torch

        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self]


class Backend(StrEnum):
    reference = "reference"
    cpu = "cpu"
    triton = "triton"
    cuda = "cuda"


WEIGHT_FILES = {".safetensors", ".pth", ".pt", ".bin", ".ckpt"}
DEFAULT_MODEL = "deit_small_patch16_224"
NUMBERS = " A number of patches is for Python: sait.set_density(model, keep=100)."


def _shares(option: str, values: list[float]) -> list[float]:
    for value in values:
        if not 0.0 < value <= 1.0:
            counts = "" if option != "--keep" or value < 2 or value % 1 else NUMBERS
            bad(option, f"expected a share in (0, 1] such as 0.45, got {value:g}.{counts}")
    return values


def check_keep(values: list[float]) -> list[float]:
    return _shares("--keep", values)


def check_mass(values: list[float]) -> list[float]:
    return _shares("--mass", values)


Weights = Annotated[
    str,
    typer.Option(
        help="auto: pretrained if the hub answers within 5 s, else random. random. Or a checkpoint file, such as "
        "`python -m sait.weights` makes."
    ),
]
Block = Annotated[int, typer.Option(help="The block at which tokens are dropped, from 0.", min=0)]
Keep = Annotated[list[float], typer.Option(help="Share of the patches to keep; repeatable.", callback=check_keep)]
Mass = Annotated[
    list[float],
    typer.Option(help="Cumulative score (top-p): share of the score to keep; repeatable.", callback=check_mass),
]
MaxKeep = Annotated[int | None, typer.Option(help="Of --mass: patches that an image keeps at most.", min=1)]
Static = Annotated[
    bool, typer.Option("--static", help="Of --mass: sizes known without data, a capacity of --max-keep patches.")
]
ScoreKind = Annotated[
    str, typer.Option(help="What ranks the tokens: cls, column, cls_value, random, or a name that you registered.")
]
Method = Annotated[
    list[str] | None,
    typer.Option(
        help="A published method, with its own blocks, in place of densities: sait, evit, ats, random, dynamicvit, "
        "cagevit, hot (--keep), ltp (--threshold), tome (--pairs), ltp_learned or adavit (trained); repeatable."
    ),
]
Pairs = Annotated[list[int], typer.Option(help="Of --method tome: pairs to merge in a block; repeatable.", min=1)]
Threshold = Annotated[list[float], typer.Option(help="Of --method ltp: the last block's; repeatable.")]
Device = Annotated[str, typer.Option(help="Such as cpu, cuda or cuda:1.")]
ForcedBackend = Annotated[
    Backend | None, typer.Option(help="Force the kernels that serve; the fastest there are by default.")
]


def bad(option: str, message: str) -> NoReturn:
    """Ends the command with one line about an option."""
    raise typer.BadParameter(message, param_hint=option)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def is_given(context: typer.Context, option: str) -> bool:
    """Whether an option of the command is on the command line, and not by default."""
    source = context.get_parameter_source(option) if option in context.params else None
    return source is not None and source.name == "COMMANDLINE"


def densities(
    context: typer.Context, keep: list[float], mass: list[float], max_keep: int | None, static: bool = False
) -> list[Density]:
    """One for each --keep, then one for each --mass, with what bounds it. Those that are given stand in place of all
    that are there by default."""
    from sait.state import Density

    if is_given(context, "keep") != is_given(context, "mass"):
        keep, mass = (keep, []) if is_given(context, "keep") else ([], mass)
    check_limits(bool(mass), max_keep, static)
    return [
        *(Density(keep=share) for share in keep),
        *(Density(mass=share, max_keep=max_keep, static=static) for share in mass),
    ]


def check_limits(mass: bool, max_keep: int | None, static: bool) -> None:
    """Ends the command where there is a limit of --mass, and no mass."""
    if not mass and (max_keep is not None or static):
        option = "--static" if max_keep is None else "--max-keep"
        bad(option, "expected a --mass that it goes with, got none; add one such as --mass 0.9.")


def check_device(name: str, backend: Backend | None) -> torch.device:
    """The device, if torch can use it and kernels, or the forced ones, serve it."""
    import torch

    import sait_kernels

    try:
        device = torch.device(name)
    except RuntimeError:
        bad("--device", f"expected cpu, cuda or cuda:N, got {name!r}.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        bad("--device", f"torch sees {torch.cuda.device_count()} GPUs, so there is no {name!r}; use cpu.")
    if device.type not in ("cpu", "cuda"):
        bad("--device", f"no kernel serves {name!r}; use cpu or cuda.")
    names = [backend.value] if backend else ["cpu"] if device.type == "cpu" else ["cuda", "triton"]
    answers = [sait_kernels.can_run("compact_attention", name, torch.empty(0, device=device)) for name in names]
    if not any(served for served, _ in answers):
        bad("--backend" if backend else "--device", f"no kernel serves {name!r}: " + answers[0][1])
    return device


def check_prunable(model: nn.Module, block: int, score: str, densities: Sequence[Density]) -> None:
    """Ends the command with the model layer's own words where it refuses the model, the block or a density."""
    import sait

    depth = len(getattr(model, "blocks", ()))
    if depth and block >= depth:
        bad("--block", f"expected 0 to {depth - 1}, for the model has {depth} blocks; got {block}.")
    try:
        sait.Plan((sait.Stage(block, keep=1.0),), score)
    except (ValueError, TypeError) as error:
        bad("--score", one_line(error))
    try:
        sait.sparsify(model, block=block, keep=1.0, score=score)
        for density in densities:
            sait.set_density(model, **asdict(density))
        sait.restore(model)
    except (ValueError, TypeError) as error:
        bad("--model", one_line(error))


@contextlib.contextmanager
def running_on(backend: Backend | None) -> Iterator[None]:
    """Forces the backend, if one is given; a failure inside is one line."""
    import sait_kernels

    try:
        with sait_kernels.backend(backend) if backend else contextlib.nullcontext():
            yield
    except RuntimeError as error:
        raise typer.TyperException(one_line(error)) from error


def model_name(given: str | None, weights: str) -> str:
    """The --model that is given, else the one that a file of sait.weights is for, else the default."""
    from sait.weights import metadata_of

    made_for = metadata_of(weights)
    if made_for is None:
        return given or DEFAULT_MODEL
    if given not in (None, made_for["model"]):
        bad("--weights", f"{weights} is for {made_for['model']}, got --model {given}; leave --model out.")
    return str(made_for["model"])


def load_model(name: str, weights: str) -> tuple[nn.Module, str]:
    """(the timm model in eval mode, its weights in words)."""
    import sait  # noqa: F401  (registers its models with timm)
    import timm
    import torch
    from sait import weights as trained

    if not timm.is_model(name):
        bad("--model", f"timm knows no {name!r}" + _what_is_there(name))
    try:
        torch.manual_seed(0)
        model = timm.create_model(name).eval()
    except RuntimeError as error:  # the architecture is there, its pretrained tag is not
        bad("--model", one_line(error))
    if weights == "random":
        return model, "random weights"
    if weights == "auto":
        return _pretrained(name) or (model, f"random weights (the hub gave none within {HUB_SECONDS:g} s)")
    if not Path(weights).is_file():
        bad("--weights", f"expected auto, random or a checkpoint file; there is no file {weights!r}.")
    made_for = trained.metadata_of(weights)
    try:
        if made_for is not None:
            return trained.load(weights), f"weights of {made_for['source']}"
        return timm.create_model(name, checkpoint_path=weights).eval(), f"weights of {Path(weights).name}"
    except Exception as error:  # whatever a damaged or foreign file makes the unpickler and the model say
        bad("--weights", f"{weights} does not load into {name}: {one_line(error)[:200]}")


def _what_is_there(name: str) -> str:
    import timm

    if Path(name).suffix in WEIGHT_FILES or os.sep in name:
        return ", and there is no such file."
    transformers = [model for model in timm.list_models() if "_patch" in model]
    begun = [model for model in transformers if model.startswith(name)]
    near = begun or difflib.get_close_matches(name, transformers, n=3, cutoff=0.4)
    return f"; near: {', '.join(near[:3])}." if near else "; see timm.list_models()."


def load_decoder(weights: str) -> nn.Module | None:
    """The saliency decoder of a file of sait.weights; None of other weights."""
    from sait import weights as trained

    return None if trained.metadata_of(weights) is None else trained.load_decoder(weights)


def _pretrained(name: str) -> tuple[nn.Module, str] | None:
    """The model with weights of the hub, else of its cache; None if neither has them."""
    import timm
    from huggingface_hub import try_to_load_from_cache

    known = timm.get_pretrained_cfg(name)
    if known is None or not known.hf_hub_id:
        return None
    overlay: dict[str, str] = {}
    if not hub_answers(known.hf_hub_id):
        # Left to itself, timm would ask again and again for half a minute before it looks into the cache.
        cached = try_to_load_from_cache(known.hf_hub_id, "model.safetensors")
        if not isinstance(cached, str):
            return None
        overlay = {"file": cached}
    try:
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay).eval(), "pretrained weights"
    except Exception:  # whatever a network that breaks off makes the client of the hub raise
        return None


def hub_answers(repository: str) -> bool:
    """Whether the hub serves this repository within HUB_SECONDS, name look-up included."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    answered = threading.Event()

    def ask() -> None:
        address = f"{endpoint}/{repository}/resolve/main/config.json"
        # OSError covers the network and an HTTP error status, ValueError an endpoint that is no address.
        with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=HUB_SECONDS).close()
            answered.set()

    # A name look-up can outlast any timeout; the thread is then left behind.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    return answered.is_set()


def load_images(model: nn.Module, batch: int, size: tuple[int, int] | None = None) -> tuple[Tensor, str]:
    """((batch, 3, height, width) float32, what they are in words): crops of the two photos, else noise.

    Of this size, or of the one that the model was trained with."""
    import torch
    from sait.data.photos import photo_batch

    expected = preprocessing(model)
    expected = expected if size is None else expected._replace(size=size)
    try:
        return photo_batch(batch, expected), "crops of two photos"
    except ImportError:
        noise = torch.randn(batch, 3, *expected.size, generator=torch.Generator().manual_seed(0))
        return noise, "random images, for scikit-learn and its photos are not installed"


def preprocessing(model: nn.Module) -> Preprocessing:
    """What the model expects of an image."""
    from sait.data.photos import preprocessing_of

    return preprocessing_of(model)


def open_photos(paths: list[Path]) -> dict[str, Image.Image]:
    """name -> photo; without paths the two that scikit-learn ships."""
    from sait.data.photos import sample_photos

    if not paths:
        return sample_photos()
    photos: dict[str, Image.Image] = {}
    for path in paths:
        photo = open_photo(path, longest=None)
        name = path.stem if path.stem not in photos else f"{path.stem}-{len(photos)}"
        photos[name] = photo
    return photos


def open_photo(path: Path, longest: int | None = 1024) -> Image.Image:
    """A picture in RGB, no larger than ``longest``; one that cannot be read ends the command with its name."""
    from sait.data.photographs import open_photograph

    try:
        return open_photograph(path, longest=longest)
    except ValueError as error:
        bad("IMAGES", one_line(error))
    except OSError as error:
        bad("IMAGES", f"cannot read {path}: {error.strerror or error}.")


def progress() -> Progress:
    """A progress bar on stderr, where somebody watches; it is gone when the work is done."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def check_writable(path: Path, option: str) -> None:
    """Finds out before the work, not after it, whether a file can be written there."""
    existed = path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        bad(option, f"cannot write {path}: {error.strerror}.")
    if not existed:
        path.unlink()


def make_folder(path: Path, option: str) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        bad(option, f"cannot write into {path}: {error.strerror}.")
