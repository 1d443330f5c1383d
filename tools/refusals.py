"""Writes docs/wrong.md: what is refused and what is said then, by trying it. ``python tools/refusals.py``."""

from __future__ import annotations

import argparse
import difflib
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

PAGE = Path(__file__).resolve().parents[1] / "docs" / "wrong.md"
BEGIN = """import timm, torch, sait
import sait_kernels as sk

model = timm.create_model("vit_tiny_patch16_224").eval()"""
HEAD = """# What can go wrong

*Written by `python tools/refusals.py`, which tries all of it; `make test` compares.*

What cannot be done rightly is refused, with what was expected, what came, and what to do. Nothing falls back in silence
to something slow, either: `sait.explain(model)` says what a forward runs of each block, and why not something faster.

Each example begins with

```python
{}
```
"""
FOLLOWED = """## What is no error

- **Weights that change** after `sait.optimize`, by an optimizer, by `load_state_dict` or in place: they are packed
  again at the next forward.
- **A part exchanged for another of its kind**, such as `model.blocks[5].mlp.fc1 = torch.nn.Linear(...)`.
- **A NaN** in one image stays in that image; a NaN score counts as the lowest.
- **A call that a backend cannot serve**: another one serves it; `sk.can_run("compact_attention", "cuda", q, k, v, ...)`
  says why.
"""


class Refusal(NamedTuple):
    """One thing that somebody may try; the last statement of ``code`` raises."""

    title: str
    code: str
    about: str = ""


GROUPS = {
    "Models": (
        Refusal(
            "A model that is no plain Vision Transformer",
            'model = timm.create_model("swin_tiny_patch4_window7_224")\nsait.sparsify(model, block=3, keep=0.45)',
        ),
        Refusal("A model inside another", "sait.sparsify(torch.nn.DataParallel(model), block=3, keep=0.45)"),
        Refusal(
            "A compiled model",
            "sait.sparsify(torch.compile(model), block=3, keep=0.45)",
            "The other way round works: prune, then compile.",
        ),
        Refusal(
            "No class token",
            'model = timm.create_model("vit_tiny_patch16_224", class_token=False, global_pool="avg")\n'
            "sait.sparsify(model, block=3, keep=0.45)",
        ),
        Refusal("A block that is not there", "sait.sparsify(model, block=12, keep=0.45)"),
    ),
    "Densities": (
        Refusal("Per cent", "sait.sparsify(model, block=3, keep=45.0)"),
        Refusal(
            "More patches than there are",
            "sait.sparsify(model, block=3, keep=200)\nmodel(torch.randn(1, 3, 224, 224))",
        ),
        Refusal(
            "One share for several stages",
            "sait.sparsify(model, sait.methods.evit(keep=0.7))\nsait.set_density(model, keep=0.5)",
        ),
    ),
    "Changed models": (
        Refusal(
            "A forward that somebody replaced",
            "sait.sparsify(model, block=3, keep=0.45)\n"
            "model.blocks[5].forward = lambda x: x\n"
            "model(torch.randn(1, 3, 224, 224))",
        ),
        Refusal(
            "A hook on a part that the loop takes apart",
            "sait.sparsify(model, block=3, keep=0.45)\n"
            "model.blocks[5].register_forward_hook(lambda module, inputs, output: None)\n"
            "model(torch.randn(1, 3, 224, 224))",
        ),
        Refusal(
            "A block that is compiled by itself",
            "sait.sparsify(model, block=3, keep=0.45)\n"
            "model.blocks[5] = torch.compile(model.blocks[5])\n"
            "model(torch.randn(1, 3, 224, 224))",
        ),
        Refusal(
            "An attention of another kind",
            "sait.sparsify(model, block=3, keep=0.45)\n"
            "model.blocks[5].attn = torch.nn.Identity()\n"
            "model(torch.randn(1, 3, 224, 224))",
        ),
    ),
    "Derivatives": (
        Refusal(
            "Second derivatives of attention",
            "q = torch.randn(8, 1, 32, requires_grad=True)\n"
            "out = sk.compact_attention(q, q, q, sk.uniform_cu_seqlens(1, 8), 8)\n"
            "(gradient,) = torch.autograd.grad(out.sum(), q, create_graph=True)\n"
            "gradient.sum().backward()",
        ),
        Refusal(
            "Forward mode",
            "x = torch.randn(8, 4)\n"
            "chosen = sk.select_topk(x[:, 0].contiguous(), sk.uniform_cu_seqlens(1, 8), 8, keep=3)\n"
            "with torch.autograd.forward_ad.dual_level():\n"
            "    sk.gather_tokens(torch.autograd.forward_ad.make_dual(x, x), chosen)",
        ),
    ),
    "Methods that learn": (
        Refusal(
            "Parts that the model has not",
            "sait.sparsify(model, sait.methods.dynamicvit(keep=0.7))\n"
            "sait.set_density(model, sait.methods.dynamicvit(keep=0.7, blocks=[2, 4]))",
        ),
    ),
    "Files that leave": (
        Refusal(
            "A density that images decide",
            'sait.sparsify(model, block=3, mass=0.9)\nsait.export(model, "vit.onnx", torch.randn(2, 3, 224, 224))',
        ),
        Refusal(
            "A name that no format has",
            'sait.sparsify(model, block=3, keep=0.45)\nsait.export(model, "vit.trt", torch.randn(2, 3, 224, 224))',
        ),
    ),
    "Ops": (
        Refusal(
            "A selection of other rows",
            "chosen = sk.select_topk(torch.randn(8), sk.uniform_cu_seqlens(1, 8), 8, keep=3)\n"
            "sk.gather_tokens(torch.randn(1, 4), chosen)",
        ),
        Refusal("Starts of images in 64 bits", "sk.select_topk(torch.randn(8), torch.tensor([0, 8]), 8, keep=3)"),
        Refusal(
            "A backend that cannot serve",
            "x = torch.randn(8, 1, 32)\n"
            'with sk.backend("cuda"):\n'
            "    sk.compact_attention(x, x, x, sk.uniform_cu_seqlens(1, 8), 8)",
        ),
    ),
}


def said(code: str) -> str:
    """Type and text of what it raises; AssertionError if it raises nothing."""
    import torch

    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(BEGIN, names)
    try:
        exec(code, names)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    raise AssertionError(f"nothing was refused: {code}")


def page() -> str:
    parts = [HEAD.format(BEGIN)]
    for group, refusals in GROUPS.items():
        parts.append(f"## {group}\n")
        for refusal in refusals:
            told = textwrap.fill(said(refusal.code), 76, break_long_words=False, break_on_hyphens=False)
            about = f"\n{refusal.about}\n" if refusal.about else ""
            parts.append(f"### {refusal.title}\n\n```python\n{refusal.code}\n```\n\n```text\n{told}\n```\n{about}")
    return "\n".join([*parts, FOLLOWED])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where the page differs")
    check, written = parser.parse_args().check, page()
    if not check:
        PAGE.write_text(written, encoding="utf-8")
    elif written != PAGE.read_text(encoding="utf-8"):
        now = PAGE.read_text(encoding="utf-8").splitlines()
        sys.exit(
            "\n".join(difflib.unified_diff(now, written.splitlines(), "docs/wrong.md", "what is said", lineterm=""))
        )


if __name__ == "__main__":
    main()
