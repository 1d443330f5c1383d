"""`make families`: models of every family against their own library's forward; writes docs/families.md.

Each model comes from its library with random weights, and is pruned at a quarter of its depth to 0.45 of its patches.
The baseline is the library's own eager forward over all tokens. An error is the largest one of a float32 result against
the same computation by plain torch in float64, relative to the largest magnitude: of the library's own forward, of the
pruned model, and of the pruned and optimized model.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import sait
import timm
import torch
import typer
from harness import DEVICE
from rich.console import Console
from sait.bench import measure
from sait.families import family_of
from sait_cli import options
from sait_cli.options import DType
from torch import Tensor

import sait_kernels as sk

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "families.md"
KIND, KEEP = "families", 0.45
TIMM = "timm's own forward"
TRANSFORMERS = "transformers' own forward"
SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 224, "patch_size": 16}


class FamilyModel(NamedTuple):
    """A model of a family."""

    label: str
    make: Callable[[], Any]
    baseline: str
    side: int
    score: str = "cls"


def of_timm(name: str, side: int = 224, score: str = "cls", **kwargs: Any) -> FamilyModel:
    return FamilyModel(name, lambda: timm.create_model(name, **kwargs), TIMM, side, score)


def of_transformers(name: str, side: int = 224, score: str = "cls", **config: Any) -> FamilyModel:
    def make() -> Any:
        import transformers

        cls: Any = getattr(transformers, name)
        return cls(cls.config_class(**{**SMALL, **config}))

    return FamilyModel(name, make, TRANSFORMERS, side, score)


SUBJECTS = (
    of_timm("deit_small_patch16_224"),
    of_timm("vit_small_patch14_reg4_dinov2", img_size=224),
    of_timm("vit_base_patch16_clip_quickgelu_224"),
    of_timm("vit_base_patch16_siglip_224", score="column"),
    of_timm("vitamin_small_224", score="column"),
    of_timm("vit_small_patch16_dinov3", side=256),
    of_timm("vit_small_plus_patch16_dinov3", side=256),
    of_timm("eva02_small_patch14_224"),
    of_timm("vit_small_patch16_rope_mixed_224"),
    of_transformers("ViTForImageClassification", intermediate_size=1536),
    of_transformers("DeiTForImageClassification", intermediate_size=1536),
    of_transformers("Dinov2ForImageClassification", patch_size=14),
    of_transformers("Dinov2WithRegistersForImageClassification", patch_size=14),
    of_transformers("DINOv3ViTModel", side=256, image_size=256, intermediate_size=1536, num_register_tokens=4),
    of_transformers("CLIPVisionModel", intermediate_size=1536),
    of_transformers("SiglipVisionModel", score="column", intermediate_size=1536),
)
BLOCK = 3  # of twelve


def logits(result: Any) -> Tensor:
    """The part of a result that a user reads."""
    if isinstance(result, Tensor):
        return result
    found = getattr(result, "logits", None)
    return result.pooler_output if found is None else found


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).abs().max() / exact.abs().max())


def sparse(model: Any, subject: FamilyModel) -> Any:
    return sait.sparsify(model, sait.Plan([sait.Stage(BLOCK, KEEP)], subject.score))


@torch.inference_mode()
def errors(subject: FamilyModel, model: Any, images: Tensor) -> dict[str, float]:
    """By case. Where rounding led to another choice than float64 makes, the size of the error shows it."""
    wide = copy.deepcopy(model).double()
    found = {"dense": error(logits(model(images)), logits(wide(images.double())))}
    sparse(wide, subject)
    with sk.backend("reference"):
        exact = logits(wide(images.double()))
    sparse(model, subject)
    found["pruned"] = error(logits(model(images)), exact)
    found["optimized"] = error(logits(sait.optimize(model)(images)), exact)
    sait.restore(model)
    return found


def rows_of(subject: FamilyModel, model: Any, dtype: DType, batch: int, repeats: int) -> list[dict[str, Any]]:
    """The library's own forward, the pruned model and the optimized one, measured in turn."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, subject.side, subject.side, generator=generator)
    wrong = errors(subject, model, images[:2])
    typed = dtype.as_torch()
    model, images = model.to(typed), images.to(typed)
    own, pruned = copy.deepcopy(model), sparse(copy.deepcopy(model), subject)
    optimized = sait.optimize(sparse(copy.deepcopy(model), subject))
    with torch.inference_mode():
        calls = [lambda vit=vit: vit(images) for vit in (own, pruned, optimized)]
        base, *taken = measure.interleave(calls, repeats, device=DEVICE)
    kept = sait.selections(pruned)[0].max_seqlen
    family: Any = family_of(type(pruned))
    tokens = family.num_prefix(pruned) + family.grid(pruned)[0] * family.grid(pruned)[1]
    dense_plan = sait.Plan([sait.Stage(BLOCK, 1.0)], subject.score)
    size = (subject.side, subject.side)
    cases = (
        ("dense", base, tokens, sait.macs(pruned, dense_plan, img_size=size)),
        ("pruned", taken[0], kept, sait.macs(pruned, img_size=size)),
        ("optimized", taken[1], kept, sait.macs(pruned, img_size=size)),
    )
    return [
        {
            "name": "model",
            "case": case,
            "model": subject.label,
            "plan": "dense" if case == "dense" else f"block={BLOCK}, keep={KEEP}, score={subject.score}",
            "batch": batch,
            "dtype": dtype.value,
            "baseline": subject.baseline,
            "ours_us": round(seconds * 1e6, 1),
            "baseline_us": round(base * 1e6, 1),
            "ratio": round(base / seconds, 3),
            "images_per_s": round(batch / seconds, 2),
            "tokens": left,
            "gmac": round(macs / 1e9, 3),
            "max_error": float(f"{wrong[case]:.2g}"),
            "weights": "random",
        }
        for case, seconds, left, macs in cases
    ]


def lines_of(name: str) -> int:
    return len((ROOT / "python" / "sait" / "families" / f"{name}.py").read_text(encoding="utf-8").splitlines())


FILES = {
    "timm VisionTransformer": ("timm_vit", "DeiT, DINOv2, CLIP, SigLIP, FlexiViT, ViTamin and 200 others in timm"),
    "timm Eva": ("timm_eva", "DINOv3, EVA-02, Perception Encoder, ViTs with rotary positions"),
    "transformers, shared": ("hf", ""),
    "transformers ViT, DeiT": ("hf_vit", "with classification heads"),
    "transformers DINO": ("hf_dino", "DINOv2, with and without registers, and DINOv3; with heads and gated MLPs"),
    "transformers CLIP, SigLIP": ("hf_clip", "the vision models, with heads and projection"),
}


def page(document: dict[str, Any]) -> str:
    """docs/families.md."""
    lines = [
        "# Model families",
        "",
        "Written by `make families`. To add a family, see [Extending](extending.md#a-family-of-models).",
    ]
    lines += ["", "| family | lines of code | models |", "| --- | ---: | --- |"]
    lines += [f"| {name} | {lines_of(file)} | {models} |" for name, (file, models) in FILES.items()]
    lines += ["", "## Errors and speed", ""]
    lines.append(
        f"Random weights, {KEEP} of the patches kept at block {BLOCK}; {document['device']}, {document['threads']} "
        f"threads, torch {document['versions']['torch']}, {document['date'][:10]}. Errors are those of float32 against "
        "float64, relative to the largest value of the result. Speed is in images a second, followed by the ratio to "
        "the library's own forward in the same process."
    )
    for dtype in dict.fromkeys(row["dtype"] for row in document["rows"]):
        rows = [row for row in document["rows"] if row["dtype"] == dtype]
        lines += ["", f"### {dtype}, batch {rows[0]['batch']}", ""]
        lines.append("| model | error: own forward | pruned | optimized | img/s: own forward | pruned | optimized |")
        lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
        for model in dict.fromkeys(row["model"] for row in rows):
            of_model = [row for row in rows if row["model"] == model]
            wrong = " | ".join(f"{row['max_error']:.1e}" for row in of_model)
            dense, *others = of_model
            speeds = [f"{dense['images_per_s']:.1f}"]
            speeds += [f"{row['images_per_s']:.1f} ({row['ratio']:.2f}×)" for row in others]
            lines.append(f"| {model} | {wrong} | {' | '.join(speeds)} |")
    return "\n".join(lines) + "\n"


def chosen(names: Iterable[str]) -> list[FamilyModel]:
    known = {subject.label: subject for subject in SUBJECTS}
    for name in names:
        if name not in known:
            options.bad("--model", f"expected some of {', '.join(known)}, got {name!r}.")
    return [known[name] for name in names] or list(SUBJECTS)


def main(
    models: Annotated[list[str], typer.Option("--model", help="Some of the models; repeatable.")] = [],  # noqa: B006
    dtypes: Annotated[list[DType], typer.Option("--dtype", help="Repeatable.")] = [DType.bf16, DType.fp32],  # noqa: B006
    batch: Annotated[int, typer.Option(min=1)] = 16,
    repeats: Annotated[int, typer.Option(help="Samples of each.", min=1)] = 5,
    save: Annotated[Path | None, typer.Option("--save-results", help="Folder for the results file.")] = None,
    page_only: Annotated[Path | None, typer.Option("--page-of", help="Only writes the page of a results file.")] = None,
) -> None:
    """Models of every family against their own library's forward."""
    if page_only is not None:
        PAGE.write_text(page(json.loads(page_only.read_text(encoding="utf-8"))), encoding="utf-8")
        return
    console = Console(highlight=False)
    document = measure.results([], DEVICE, kind=KIND)
    for dtype in dtypes:
        for subject in chosen(models):
            torch.manual_seed(0)
            found = rows_of(subject, subject.make().eval(), dtype, batch, repeats)
            document["rows"] += found
            said = ", ".join(f"{row['case']} {row['ratio']:.2f} ({row['max_error']:.1e})" for row in found)
            console.print(f"{subject.label} {dtype.value}: {said}")
            if save is not None:
                measure.save(document, save / measure.file_name(document))
    if save is not None:
        PAGE.write_text(page(document), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
