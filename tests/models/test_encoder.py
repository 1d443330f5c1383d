"""All blocks in one op: several models, threads and processes at once, and weights that change in between."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sait
import torch
import zoo
from helpers import assert_same_bits, run_python, torch_threads
from optimized import sparse

import sait_kernels as sk


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of images of each call of the op."""
    images, encode = [], sk.packed_encoder

    def noted(*args: Any, **options: Any) -> Any:
        images.append(len(args[1]) - 1)
        return encode(*args, **options)

    monkeypatch.setattr(sk, "packed_encoder", noted)
    return images


@pytest.mark.parametrize("threads", [1, 2, 3])
@torch.no_grad()
def test_models_and_threads_at_once(threads: int, encoded: list[int]) -> None:
    """Two models, each called by two threads: every result is that of a call alone."""
    models = [sait.optimize(sparse("vit", keep=0.5)), sait.optimize(sparse("registers", mass=0.8))]
    inputs = [zoo.images("vit"), zoo.images("registers")]
    want = [model(x) for model, x in zip(models, inputs, strict=True)]

    def run(i: int) -> list[torch.Tensor]:
        with torch.no_grad():
            return [models[i % 2](inputs[i % 2]) for _ in range(10)]

    with torch_threads(threads), ThreadPoolExecutor(4) as pool:
        for i, results in enumerate(pool.map(run, range(4))):
            for got in results:
                assert_same_bits(f"caller {i}", got, want[i % 2])
    assert len(encoded) == 2 + 4 * 10


@torch.no_grad()
def test_weights_that_change_between_two_calls(encoded: list[int]) -> None:
    model, other, x = sait.optimize(sparse("vit")), sparse("vit"), zoo.images("vit")
    model(x)
    for change in (lambda block: block.mlp.fc1.weight.mul_(1.5), lambda block: block.norm1.bias.add_(0.3)):
        for vit in (model, other):
            change(vit.blocks[1])
        torch.testing.assert_close(model(x), other(x), rtol=0, atol=1e-4)
    assert len(encoded) == 3


@torch.no_grad()
def test_another_block(encoded: list[int]) -> None:
    model, x = sait.optimize(sparse("vit")), zoo.images("vit")
    before = model(x)
    model.blocks[2] = copy.deepcopy(model.blocks[3])
    got = model(x)
    assert (got - before).abs().max() > 1e-2
    torch.testing.assert_close(got, sait.deoptimize(model)(x), rtol=0, atol=1e-4)
    assert len(encoded) == 2


def test_whoever_trains_in_between(encoded: list[int]) -> None:
    """After a forward with gradients all is packed anew, for not every update shows: here one value, past torch's
    count, between those that are sampled."""
    model, other, x = sait.optimize(sparse("vit")), sparse("vit"), zoo.images("vit")
    with torch.inference_mode():
        before = model(x)
    model(x)
    for vit in (model, other):
        vit.blocks[0].mlp.fc1.weight.data.view(-1)[2] += 4
    with torch.inference_mode():
        torch.testing.assert_close(model(x), other(x), rtol=0, atol=1e-4)
        assert (model(x) - before).abs().max() > 1e-2
    assert len(encoded) == 3


PROGRAM = """
import multiprocessing, sys
import torch

def compute():
    sys.path[:0] = {path!r}
    import sait, timm
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, embed_dim=64, num_heads=2, depth=3).eval()
    model = sait.optimize(sait.sparsify(model, block=1, keep=0.5))
    with torch.inference_mode():
        return model(torch.ones(3, 3, 64, 64).cumsum(2) / 64)

def child(queue):
    queue.put(compute().double().tolist())

if __name__ == "__main__":
    here = compute().double().tolist()
    for method in ("fork", "spawn"):
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        process = context.Process(target=child, args=(queue,))
        process.start()
        there = queue.get(timeout=120)
        process.join(30)
        print(method, process.exitcode, here == there)
"""


def test_processes(tmp_path: Path) -> None:
    """Of a child that is forked from one that has computed, and of one that starts anew."""
    python = str(Path(sait.__file__).parents[1])
    (tmp_path / "program.py").write_text(PROGRAM.format(path=[python]))
    done = run_python(str(tmp_path / "program.py"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["fork 0 True", "spawn 0 True"]
