"""What the commands share: option types, and the checks that turn a bad argument into one line that helps."""

from __future__ import annotations

import contextlib
import difflib
import http.client
import os
import threading
import urllib.request
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    import torch
    from torch import nn

HUB_SECONDS = 5.0


class DType(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"

    def torch(self) -> torch.dtype:
        import torch

        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self]


class Score(StrEnum):
    cls = "cls"
    column = "column"
    cls_value = "cls_value"


class Backend(StrEnum):
    reference = "reference"
    cpu = "cpu"
    triton = "triton"
    cuda = "cuda"


def share(name: str, values: list[float]) -> list[float]:
    for value in values:
        if not 0.0 < value <= 1.0:
            bad(name, f"expected a share in (0, 1] such as 0.45, got {value:g}.")
    return values


def check_keep(values: list[float]) -> list[float]:
    return share("--keep", values)


def check_mass(values: list[float]) -> list[float]:
    return share("--mass", values)


Model = Annotated[str, typer.Option(help="Any timm Vision Transformer.")]
Weights = Annotated[
    str,
    typer.Option(help="auto: pretrained if the hub answers within 5 s, else random. random. Or a checkpoint file."),
]
Block = Annotated[int, typer.Option(help="The block at which tokens are dropped, from 0.", min=0)]
Keep = Annotated[list[float], typer.Option(help="Share of the patches to keep; repeatable.", callback=check_keep)]
Mass = Annotated[list[float], typer.Option(help="Share of the score to keep; repeatable.", callback=check_mass)]
ScoreKind = Annotated[Score, typer.Option(help="What ranks the tokens.")]
Device = Annotated[str, typer.Option(help="Such as cpu, cuda or cuda:1.")]
ForcedBackend = Annotated[
    Backend | None, typer.Option(help="Force the kernels that serve; the fastest there are by default.")
]


def bad(option: str, message: str) -> NoReturn:
    """Ends the command with one line about an option."""
    raise typer.BadParameter(message, param_hint=option)


@contextlib.contextmanager
def refusals(option: str) -> Iterator[None]:
    """A refusal of the model layer or of the ops inside becomes one line about ``option``."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError) as error:
        bad(option, " ".join(str(error).split()))


def check_device(name: str) -> torch.device:
    """The device, if torch can use it and the kernels serve it."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        bad("--device", f"expected cpu, cuda or cuda:N, got {name!r}.")
    if device.type not in ("cpu", "cuda"):
        bad("--device", f"no kernel serves {device.type!r}; use cpu or cuda.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        bad("--device", f"torch sees {torch.cuda.device_count()} GPUs, so there is no {name!r}; use cpu.")
    return device


def check_served(device: torch.device, backend: Backend | None) -> None:
    """Ends the command where no kernel, or not the forced one, serves the device."""
    import sait_kernels
    import torch

    example = torch.empty(0, device=device)
    names = [backend.value] if backend else ["cuda", "triton", "cpu"]
    answers = {name: sait_kernels.can_run("compact_attention", name, example) for name in names}
    if not any(served for served, _ in answers.values()):
        reasons = "; ".join(f"{name}: {reason}" for name, (_, reason) in answers.items())
        option = "--backend" if backend else "--device"
        bad(option, f"no kernel serves {device.type} here ({reasons}). `--backend reference` runs plain torch.")


@contextlib.contextmanager
def served_by(backend: Backend | None) -> Iterator[None]:
    import sait_kernels

    with sait_kernels.backend(backend.value) if backend else contextlib.nullcontext():
        yield


def load_model(name: str, weights: str) -> tuple[nn.Module, str]:
    """(the timm model in eval mode, its weights in words)."""
    import timm
    import torch

    import sait  # noqa: F401  (registers its models with timm)

    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        bad(
            "--model",
            f"timm knows no {name!r}; " + (f"near: {', '.join(near)}." if near else "see timm.list_models()."),
        )
    torch.manual_seed(0)
    if weights == "random":
        return timm.create_model(name).eval(), "random weights"
    if weights != "auto":
        if not Path(weights).is_file():
            bad("--weights", f"expected auto, random or a checkpoint file; there is no file {weights!r}.")
        try:
            return timm.create_model(name, checkpoint_path=weights).eval(), f"weights of {Path(weights).name}"
        except Exception as error:  # whatever a damaged or foreign file makes the unpickler and the model say
            bad("--weights", f"{weights} does not load into {name}: {' '.join(str(error).split())[:200]}")
    return _pretrained(name)


def _pretrained(name: str) -> tuple[nn.Module, str]:
    """Pretrained weights from the hub, else from its cache; else random ones, and why."""
    import timm
    from huggingface_hub import try_to_load_from_cache

    known = timm.get_pretrained_cfg(name)
    repository = known.hf_hub_id if known else None
    if not repository:
        return timm.create_model(name).eval(), "random weights (timm has no pretrained ones)"
    if hub_answers(repository):
        return timm.create_model(name, pretrained=True).eval(), "pretrained weights"
    # Left to itself, timm would ask again and again for half a minute before it looks into the cache.
    cached = try_to_load_from_cache(repository, "model.safetensors")
    if isinstance(cached, str):
        return timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay={"file": cached}
        ).eval(), "pretrained weights"
    return timm.create_model(name).eval(), f"random weights (the hub did not answer within {HUB_SECONDS:g} s)"


def hub_answers(repository: str) -> bool:
    """Whether the hub serves this repository within HUB_SECONDS, name look-up included."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    answered = threading.Event()

    def ask() -> None:
        request = urllib.request.Request(f"{endpoint}/{repository}/resolve/main/config.json", method="HEAD")
        # OSError covers the network and an HTTP error status, ValueError an endpoint that is no address.
        with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
            urllib.request.urlopen(request, timeout=HUB_SECONDS).close()
            answered.set()

    # A name look-up can outlast any timeout; the thread is then left behind.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    return answered.is_set()


def writable_file(path: Path, option: str) -> Path:
    """The path, if a file can be written there; found out before the work, not after it."""
    if path.is_dir():
        bad(option, f"{path} is a folder; name a file.")
    existed = path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        bad(option, f"cannot write {path}: {error.strerror}.")
    if not existed:
        path.unlink()
    return path


def writable_folder(path: Path, option: str) -> Path:
    """The folder, made if it is not there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        bad(option, f"cannot write into {path}: {error.strerror}.")
    return path
