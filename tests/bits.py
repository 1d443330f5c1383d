"""The bits of every model, before and after a change that must not move them.

    python tests/bits.py write FILE      before it: a hash of each result
    python tests/bits.py compare FILE    after it: names what differs; exit code 1 where anything does

Of each model of the zoo, and of SaitViT: logits, features, what is kept, scores, and the gradient of each parameter, at
every plan; in training with stochastic depth and dropout; optimized; in bfloat16 and under autocast. Hashes are of one
machine and one set of versions: they are compared, and never committed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import sait
import timm
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent / "models"))

import zoo

Hashes = dict[str, str]
TRAINED = {"drop_path_rate": 0.3, "proj_drop_rate": 0.1, "pos_drop_rate": 0.1}


def hash_of(result: Any) -> str:
    digest = hashlib.sha256()
    for tensor in _tensors(result):
        digest.update(f"{tensor.shape}{tensor.dtype}".encode())
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, int):
        yield torch.tensor([result])
    else:
        for part in result:
            yield from _tensors(part)


def inference(model: Any, x: Tensor) -> Iterator[tuple[str, Any]]:
    with torch.inference_mode():
        yield "logits", model(x)
        yield "kept", sait.selections(model)
        yield "features", model.forward_features(x)


def training(model: Any, x: Tensor) -> Iterator[tuple[str, Any]]:
    torch.manual_seed(0)
    model.zero_grad()
    scores: list[Tensor] = []
    if isinstance(model, sait.SaitViT):
        logits = model(x)
    else:
        with sait.record_scores(model) as scores:
            logits = model(x)
    loss = logits.float().square().mean() + sum((score[::2].sum() for score in scores), torch.zeros(()))
    loss.backward()
    yield "logits", logits
    yield "scores", scores
    yield "gradients", [p.grad for p in model.parameters() if p.grad is not None]


def under_autocast(model: Any, x: Tensor) -> Iterator[tuple[str, Any]]:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        yield "logits", model(x)


def runs() -> Iterator[tuple[str, Callable[[], Iterator[tuple[str, Any]]]]]:
    """(name, what it gives), one at a time."""
    for name in zoo.ZOO:
        x = zoo.images(name)
        for number, plan in enumerate([None, *zoo.plans(name)]):
            model = sait.sparsify(zoo.build(name), plan or zoo.plans(name)[0])
            if plan is None:
                sait.set_density(model)
            yield f"{name}, plan {number}", partial(inference, model, x)
            yield f"{name}, plan {number}, trained", partial(training, model, x)
            half, x_half = model.bfloat16().eval(), x.bfloat16()
            yield f"{name}, plan {number}, bfloat16", partial(inference, half, x_half)
            if plan is not None:
                wide = sait.sparsify(zoo.build(name), plan)
                yield f"{name}, plan {number}, autocast", partial(under_autocast, wide, x)
                sait.optimize(wide)
                yield f"{name}, plan {number}, optimized", partial(inference, wide, x)
    for name in ("vit", "layerscale_qknorm", "siglip", "distilled", "gated"):
        x = zoo.images(name)
        for number, plan in enumerate(zoo.plans(name)):
            model = sait.sparsify(zoo.build(name, **TRAINED), plan).train()
            torch.manual_seed(1)
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
            yield f"{name}, plan {number}, drops", partial(training, model, x)
            model.set_grad_checkpointing()
            yield f"{name}, plan {number}, checkpointed", partial(training, model, x)
    small = {"img_size": 64, "num_classes": 10, "depth": 4, "embed_dim": 64, "num_heads": 2}
    for number, density in enumerate(({"keep": 0.4}, {"mass": 0.6}, {"mass": 0.7, "max_keep": 9, "static": True}, {})):
        for score in ("cls", "column", "cls_value"):
            torch.manual_seed(2)
            model = timm.create_model("sait_deit_tiny_patch16_224", **small, block=1, score=score, **density).eval()
            x = torch.randn(3, 3, 64, 64)
            if not density:
                sait.set_density(model)
            named = f"SaitViT, density {number}, {score}"
            yield named, partial(inference, model, x)
            yield f"{named}, trained", partial(training, model, x)
            yield f"{named}, optimized", partial(inference, sait.optimize(model), x)


def hashes() -> Hashes:
    return {f"{name}: {what}": hash_of(result) for name, run in runs() for what, result in run()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("write", "compare"))
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = hashes()
    if arguments.action == "write":
        arguments.file.write_text(json.dumps(found, indent=0))
        print(f"{len(found)} results")
        return 0
    recorded = json.loads(arguments.file.read_text())
    different = [name for name in recorded if found.get(name) != recorded[name]]
    print(*different, f"{len(different)} of {len(recorded)} results differ", sep="\n")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
