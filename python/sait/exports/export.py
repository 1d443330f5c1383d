"""export: a sparse model as a program that other engines run."""

from __future__ import annotations

import copy
import importlib.util
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sait.exports.formats import BATCH, COMPILED, FORMATS, Content, Format, Run
from sait.exports.plain_ops import decompositions
from sait.methods.scorers import RandomScore
from sait.state import State, density, selections, sparse_family, state_of
from sait_kernels.version import __version__

# Of the largest result: more than rounding in another order comes to. Beyond it another token was chosen, or the engine
# computes something else.
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}


class Exported(NamedTuple):
    """What export wrote.

    Attributes:
        path: the file.
        format: its name: "ONNX", "OpenVINO", "torch.export", "TorchScript" or "AOTInductor".
        outputs: the names of the results, in their order.
        errors: batch size -> largest difference to the model's own results, relative to the largest of these; empty
            where nothing was checked.
    """

    path: Path
    format: str
    outputs: tuple[str, ...]
    errors: dict[int, float]


@torch.no_grad()
def export(
    model: Any,
    path: str | os.PathLike[str],
    images: Tensor,
    *,
    dynamic: bool = True,
    kernels: bool = False,
    compiled: bool = False,
    check: bool = True,
) -> Exported:
    """Writes a sparse model, at its density of now, as a program of plain torch ops, for machines without this package.

    The suffix decides: ``.onnx``; ``.xml`` for OpenVINO, with a ``.bin`` beside it; ``.pt2`` for torch.export;
    ``.ts`` for TorchScript. The input is ``images`` (B, 3, height, width), normalised as the model expects; the result
    ``logits``, ``features`` of a model without a classifier, or what a model of transformers calls it. A share is a
    fixed number of tokens there, of every image. Of broken images (NaN) and equal scores an engine may keep others than
    this package does.

    >>> import sait, timm, torch
    >>> model = sait.sparsify(timm.create_model("deit_tiny_patch16_224"), block=3, keep=0.45).eval()
    >>> sait.export(model, "deit.onnx", torch.randn(2, 3, 224, 224)).errors  # doctest: +SKIP
    {2: 6.1e-07, 3: 6.3e-07}

    Args:
        model: from sparsify, or a SaitViT, in eval mode, at a density that keeps as many tokens of every image. Its
            weights are not changed.
        path: a file; one that is there is replaced when the new one is complete.
        images: (B, 3, height, width), an example: its size and dtype are the program's.
        dynamic: whether the batch is open; else it is B.
        kernels: keep the ops of sait_kernels in a ``.pt2``: as fast and exact as the model here; whoever loads it
            imports sait_kernels first. With them densities that images decide leave, too, if they are static.
        compiled: ``.pt2`` becomes a package of machine code for CPUs such as this one, by AOTInductor; it needs a C++
            compiler.
        check: run the file, where its engine is installed, on the example and on a batch of another size, and compare.

    Returns:
        What was written, and how far it is from the model.

    Raises:
        TypeError: the model is not sparse.
        ValueError: train mode, an unknown suffix, options that its format has not, or a density that images decide: the
            message has the share that keeps as many tokens of these images.
        ImportError: a package that the format needs is missing; its name is in the message.
        RuntimeError: torch.export does not take the model, the format cannot express it, or the file's results are not
            the model's.
        OSError: the file cannot be written.
    """
    path = Path(path)
    state, form = state_of(model, "export"), _format(path, kernels, compiled)
    if model.training:
        raise ValueError("export: model: expected eval mode, got train mode. Call model.eval().")
    if images.dim() != 4:
        raise ValueError(f"export: images: expected (B, 3, height, width), got {tuple(images.shape)}.")
    if next(model.parameters()).device.type != "cpu":
        model = copy.deepcopy(model).cpu()
    images = images.cpu()
    if dynamic and len(images) == 1:
        images = images.expand(2, -1, -1, -1).contiguous()  # torch.export takes a size of 1 for fixed
    _check_density(model, state, images, kernels)
    _check_installed(form)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"export: path: expected an existing folder, got {path.parent}.")

    flat = Flat(model)
    outputs = tuple(flat.named(images))
    program = _program(flat, images, dynamic)
    if not kernels:
        program = program.run_decompositions(decompositions())
        _check_plain(program)
    content = Content(program, images, outputs, dynamic, _metadata(model))
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        written = Path(folder) / path.name
        _write(form, content, written)
        checks = check and _installed(form.reads_with)
        errors = _compared(flat, form.read(written), images, dynamic) if checks else {}
        for file in Path(folder).iterdir():
            file.replace(path.parent / file.name)
    return Exported(path, form.label, outputs, errors)


class Flat(nn.Module):
    """A model whose result is a tensor or a tuple of tensors, whatever the model itself makes of them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        results = tuple(self.named(images).values())
        return results[0] if len(results) == 1 else results

    def named(self, images: Tensor) -> dict[str, Tensor]:
        results = self.model(images)
        if isinstance(results, Tensor):
            return {"logits" if getattr(self.model, "num_classes", 1) else "features": results}
        if isinstance(results, Mapping):
            return {name: result for name, result in results.items() if isinstance(result, Tensor)}
        return {f"output{i}": result for i, result in enumerate(results)}


def _format(path: Path, kernels: bool, compiled: bool) -> Format:
    form = FORMATS.get(path.suffix)
    if form is None:
        known = ", ".join(f"{suffix} ({form.label})" for suffix, form in FORMATS.items())
        raise ValueError(f"export: path: expected a name that ends in one of {known}, got {path.name!r}.")
    for name, given in (("compiled", compiled), ("kernels", kernels)):
        if given and not form.keeps_ops:
            raise ValueError(f"export: {name}: expected a .pt2 for it, got {path.name!r}. Leave it out, or rename.")
    return COMPILED if compiled else form


def _program(flat: Flat, images: Tensor, dynamic: bool) -> torch.export.ExportedProgram:
    sizes = ({0: torch.export.Dim(BATCH)},) if dynamic else None
    try:
        return torch.export.export(flat, (images,), dynamic_shapes=sizes)
    except Exception as error:  # whatever a method or a family of somebody's own makes of the tracer
        cure = "Write shape[0] for the len() of a tensor, or pass dynamic=False." if dynamic else ""
        said = " ".join(str(error).split())[:200]
        raise RuntimeError(f"export: model: torch.export does not take it: {said} {cure}".rstrip()) from error


def _write(form: Format, content: Content, path: Path) -> None:
    try:
        form.write(content, path)
    except OSError:
        raise
    except Exception as error:  # converters have no error of their own in common
        ops = sorted(set(re.findall(r"aten[.:]+\w+", str(error))))
        missing = f"no form of {', '.join(ops)}" if ops else " ".join(str(error).split())[:200]
        raise RuntimeError(
            f"export: {form.label} has {missing}. Stages that only drop tokens go into every format; others, as a .pt2."
        ) from error


def _check_density(model: Any, state: State, images: Tensor, kernels: bool) -> None:
    plan = state.active
    if plan is None:
        return
    if any(isinstance(stage.scorer, RandomScore) for stage in plan.stages):
        raise ValueError(
            "export: model: expected a score that an image decides, got noise, which each engine draws for itself. "
            'Take score="cls" or "column".'
        )
    if plan.gated:
        raise ValueError(
            "export: model: its gates decide by image what runs, and a program runs the same for each. Export it "
            "dense, sait.set_density(model), or by another plan."
        )
    if not plan.ragged:
        return
    if not kernels:
        raise ValueError(
            "export: model: its images keep different numbers of tokens, and a program of plain ops keeps as many of "
            f"each. These images keep as many by {_nearest(model, state, images)}."
        )
    if not plan.static:
        raise ValueError(
            "export: model: its images decide on sizes. Make them static: sait.set_density(model, mass=..., "
            f"static=True, max_keep=...); or fixed: {_nearest(model, state, images)}."
        )


def _nearest(model: Any, state: State, images: Tensor) -> str:
    """The call by which each stage keeps the share that it keeps of these images, in the mean."""
    plan, family = state.active, sparse_family(model)
    assert plan is not None
    model(images)
    prefix = family.num_prefix(model)
    rows, columns = family.grid(model, (images.shape[2], images.shape[3]))
    patches, shares = float(rows * columns), []
    for kept in selections(model):
        left = int(kept.cu_seqlens[-1]) / len(images) - prefix
        shares.append(max(round(left / max(patches, 1.0), 2), 0.01))
        patches = left
    if len(shares) == 1:
        return f"sait.set_density(model, keep={shares[0]})"
    stages = ", ".join(f"Stage({stage.block}, {share})" for stage, share in zip(plan.stages, shares, strict=True))
    return f"sait.set_density(model, Plan([{stages}]))"


def _check_installed(form: Format) -> None:
    missing = [name for name in form.writes_with if not _installed([name])]
    if missing:
        raise ImportError(f"export: {form.label} needs {' and '.join(missing)}: pip install {' '.join(missing)}.")


def _installed(packages: Iterable[str]) -> bool:
    return all(importlib.util.find_spec(name) is not None for name in packages)


def _check_plain(program: torch.export.ExportedProgram) -> None:
    ops = {str(node.target) for node in program.graph.nodes if str(node.target).startswith("sait.")}
    if ops:
        raise ValueError(
            f"export: model: no plain form of {', '.join(sorted(ops))}. Keep the ops in a .pt2: kernels=True."
        )


def _metadata(model: Any) -> dict[str, Any]:
    plan = density(model)
    return {
        "model": type(model).__name__,
        "plan": None if plan is None else plan.name,
        "sait_kernels": __version__,
        "torch": torch.__version__,
    }


def _compared(model: Flat, run: Run, images: Tensor, dynamic: bool) -> dict[int, float]:
    """Batch size -> error; RuntimeError where it is more than rounding."""
    errors = {}
    for batch in (images, torch.cat([images, images[:1]])) if dynamic else (images,):
        errors[len(batch)] = error = max(map(_error, run(batch), model.named(batch).values()))
        if not error <= ROUNDING[images.dtype]:  # NaN is none
            raise RuntimeError(
                f"export: the file's results differ from the model's by {error:.1e} of the largest one, at a batch of "
                f"{len(batch)}. Export other images, or a share that scores decide more clearly; check=False writes it "
                "all the same."
            )
    return errors


def _error(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape:
        return float("inf")
    return ((got.double() - want.double()).abs().max() / want.double().abs().max().clamp_min(1e-30)).item()
