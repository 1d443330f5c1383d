"""What users' tools do to a model after sparsify and optimize, kind by kind: followed, or refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import acts
import pytest
import sait
import torch
import torch.distributed as dist
import zoo
from helpers import assert_same_bits
from optimized import PACKED, sparse
from test_acts import built
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrize

PASSED_OVER = ("norm1", "norm2", "ls1", "ls2", "drop_path1", "drop_path2", "attn.proj_drop", "attn.q_norm", "mlp")


def images() -> Tensor:
    return torch.randn(2, 3, 80, 80, generator=torch.Generator().manual_seed(3))


def same_as_plain(model: Any, plain: Any) -> None:
    """Of the tokens that it keeps."""
    x = images()
    got = model(x)
    want = zoo.oracle(plain, x, sait.density(model), zoo.kept_tokens(model, 26)).logits
    torch.testing.assert_close(got, want, rtol=0, atol=2e-4 * float(want.abs().max()))


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("path", PASSED_OVER)
@torch.no_grad()
def test_hooks_on_what_the_stage_fuses(path: str, optimized: bool) -> None:
    for block in (1, 2):
        plain, model = built(), sait.sparsify(built(), block=1, keep=0.5)
        if optimized:
            sait.optimize(model)
        before = model(images())
        for vit in (plain, model):
            vit.blocks[block].get_submodule(path).register_forward_hook(lambda _, __, out: 0.3 * out)
        assert not torch.allclose(model(images()), before, atol=1e-3)
        same_as_plain(model, plain)


@pytest.mark.parametrize("path", ["blocks", "blocks.1", "blocks.1.attn", "blocks.1.attn.attn_drop"])
@torch.no_grad()
def test_hooks_on_what_is_taken_apart(path: str) -> None:
    model, x = sait.sparsify(built(), block=1, keep=0.5), images()
    want = model(x)
    handles = [
        model.get_submodule(path).register_forward_hook(lambda *_: None),
        model.get_submodule(path).register_forward_pre_hook(lambda *_: None),
        model.get_submodule(path).register_full_backward_hook(lambda *_: None),
    ]
    for i in range(3):
        with pytest.raises(RuntimeError, match=rf"forward: {path}: it has hooks, .*set_density"):
            model(x)
        handles[i].remove()
    assert_same_bits("without hooks", model(x), want)
    model.get_submodule(path).register_forward_hook(lambda *_: None)
    sait.set_density(model)(x)
    with pytest.raises(RuntimeError, match="it has hooks"):
        torch.compile(sait.set_density(model, keep=0.5), backend="eager")(x)


def fused(kind: Any) -> Callable[[Any], None]:
    def step(model: Any) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        kind(model.parameters(), lr=1e-2, fused=True).step()

    return step


def flat_buffer(model: Any) -> None:
    """As FSDP1, ZeRO and DeepSpeed have them: parameters are views of one tensor, which is written."""
    parameters = list(model.parameters())
    flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
    for parameter, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.data = piece.view(parameter.shape)
    model(images())
    flat.mul_(0.9)


def other_thread_writes(model: Any) -> None:
    """Hogwild: another worker adds to shared memory."""
    shared = [parameter.detach().numpy() for parameter in model.parameters()]
    for array in shared:
        array += 0.01


CHANGES = {
    **{f"fused {kind.__name__}": fused(kind) for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)},
    "fused Adagrad": fused(torch.optim.Adagrad),
    "flat buffer": flat_buffer,
    "hogwild": other_thread_writes,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("inference", [False, True])
def test_updates_that_torch_does_not_count(change: str, inference: bool, calls: list[str]) -> None:
    if inference and change.startswith("fused"):
        pytest.skip("an optimizer takes no weights that were made in inference mode")
    with torch.inference_mode(inference), torch.set_grad_enabled(False):
        model = sait.optimize(sparse("vit", keep=0.5))
        before = model(images())
        CHANGES[change](model)
        calls.clear()
        got = model(images())
        assert calls == PACKED * 4
        assert not torch.allclose(got, before, atol=1e-3)
        assert_same_bits("packed anew", got, sait.optimize(copy.deepcopy(model))(images()))


def test_training_forgets_the_packed_weights() -> None:
    """Whatever an update changes, and be it one element."""
    model, x = sait.optimize(sparse("vit", keep=0.5)), images()
    with torch.inference_mode():
        before = model(x)
    model.train()(x).sum().backward()
    model.eval()
    model.blocks[2].mlp.fc1.weight.detach().numpy()[3, 5] += 100
    with torch.inference_mode():
        got = model(x)
        assert not torch.equal(got, before)
        assert_same_bits("packed anew", got, sait.optimize(copy.deepcopy(model))(x))


def test_threads_that_train_and_infer() -> None:
    """In any order of looking and packing the last forward has the last weights."""
    model, x = sait.optimize(sparse("vit", keep=0.5)), images()
    for seed in range(5):
        acts.threads(model, Random(seed))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.detach().numpy()[...] *= 0.99
        acts.threads(model, Random(seed))
        with torch.inference_mode():
            assert_same_bits("last", model(x), sait.optimize(copy.deepcopy(model))(x))


@pytest.mark.parametrize("act", [acts.checkpointed_block, acts.compiled_block, acts.other_attention])
@torch.no_grad()
def test_changes_of_whole_modules_are_refused_by_name(act: Callable[..., Any]) -> None:
    model = sait.optimize(sait.sparsify(built(), block=1, keep=0.5))
    model(images())
    act(model, Random(1))
    with pytest.raises((RuntimeError, TypeError), match=r"blocks\.\d"):
        model(images())
    sait.set_density(model)(images())


def test_checkpointing_before_sparsify_names_the_way_that_works() -> None:
    model = built()
    model.blocks[1] = checkpoint_wrapper(model.blocks[1])
    with pytest.raises(TypeError, match=r"blocks.1: .*CheckpointWrapper: .*set_grad_checkpointing"):
        sait.sparsify(model, block=1, keep=0.5)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_quantised_layers_run_as_they_are() -> None:
    """Those of quantize_dynamic have no weight to read; their multiply-adds are those of what they stand for."""
    model, x = sait.sparsify(built(), block=1, keep=0.5), images()
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    want = quantised(x)
    assert not torch.equal(want, model(x))
    assert_same_bits("optimized", sait.optimize(quantised)(x), want)
    assert "no plain linear layer" in sait.explain(quantised).blocks[0].why
    assert sait.macs(quantised) == sait.macs(model)


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


@torch.no_grad()
def test_a_class_on_top_stays() -> None:
    model, plain, x = sait.sparsify(built(), block=1, keep=0.5), built(), images()
    for vit in (model, plain):
        parametrize.register_parametrization(vit, "pos_embed", Half())
    same_as_plain(model, plain)
    sait.sparsify(model, block=2, keep=0.3)
    assert parametrize.is_parametrized(model, "pos_embed")
    same_as_plain(model, plain)
    with pytest.raises(TypeError, match="restore: model: its class ParametrizedSparseVisionTransformer was put on top"):
        sait.restore(model)
    parametrize.remove_parametrizations(model, "pos_embed")
    parametrize.remove_parametrizations(plain, "pos_embed")
    assert_same_bits("restored", sait.restore(model)(x), plain(x))


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@torch.no_grad()
def test_sharded_models(mesh: Any) -> None:
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    model, x = sait.sparsify(built(), block=1, keep=0.5), images()
    want = model(x)
    fsdp.fully_shard(model, mesh=mesh)
    torch.testing.assert_close(model(x), want, rtol=0, atol=1e-5)
    sait.sparsify(model, block=0, keep=0.7)
    assert isinstance(model, fsdp.FSDPModule)
    model(x)
    blocks = sait.sparsify(built(), block=1, keep=0.5)
    for block in blocks.blocks:
        fsdp.fully_shard(block, mesh=mesh)
    with pytest.raises(RuntimeError, match=r"blocks.0: .*shards.*fully_shard\(model\)"):
        blocks(x)
    with pytest.raises(TypeError, match=r"is sharded\. Call sparsify first"):
        sait.sparsify(fsdp.fully_shard(built(), mesh=mesh), block=1, keep=0.5)
