"""Every peer computes what it says, in as many rows as it says."""

from __future__ import annotations

import copy
import sys
import threading
from functools import partial
from typing import Any

import pytest
import sait
import torch
from helpers import torch_threads
from peers import PEERS, Setting
from peers.engines import OnnxRuntime, OpenVino
from peers.evit import Evit
from peers.tome import Tome, merge
from sait.bench.plain import PlainPruning, PlainViT, share
from tiny import images, small_vit
from torch import Tensor

import sait_kernels as sk

MODELS = ["vit_small_patch16_224", "deit_small_distilled_patch16_224"]


def setting(vit: Any | None = None) -> Setting:
    return Setting(vit or small_vit(), images(), block=1, keep=0.45, mass=0.9)


@torch.no_grad()
def test_a_shared_copy_has_no_weights_of_its_own() -> None:
    vit = small_vit()
    copied = share(vit)
    assert copied is not vit
    assert [p.data_ptr() for p in copied.parameters()] == [p.data_ptr() for p in vit.parameters()]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_what_drops_nothing_is_the_dense_model(name: str) -> None:
    vit = small_vit(name)
    expected = vit(images())
    for peer in (PlainViT(vit), PlainPruning(vit, 1, 1.0), Evit(vit, (1, 2, 3), 1.0), Tome(vit, 0)):
        torch.testing.assert_close(
            peer(images()), expected, msg=lambda text, peer=peer: f"{type(peer).__name__} {text}"
        )


@pytest.mark.parametrize("keep", [0.45, 0.04])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_plain_pruning_is_ours(name: str, keep: float) -> None:
    vit = small_vit(name)
    ours = sait.sparsify(share(vit), block=1, keep=keep)
    with sk.backend("reference"):
        expected = ours(images())
    torch.testing.assert_close(PlainPruning(vit, 1, keep)(images()), expected)


EVAS = ["vit_small_patch16_dinov3", "vit_small_plus_patch16_dinov3", "vit_small_patch16_rope_mixed_224"]


def small_eva(name: str) -> Any:
    """Logits of the size of 1: timm starts with a head that hides every difference."""
    vit = small_vit(name)
    torch.nn.init.normal_(vit.head.weight)
    if vit.rope_mixed:
        vit.rope.float()  # timm 1.0.28 makes mixed tables of float32 only
    return vit


@pytest.mark.parametrize("name", EVAS)
@torch.no_grad()
def test_plain_pruning_takes_positions_along(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary tables of all blocks and of each, gated MLPs, registers, pooling over what is left."""
    vit = small_eva(name)
    torch.testing.assert_close(PlainPruning(vit, 1, 1.0)(images()), vit(images()))
    ours = sait.sparsify(share(vit), block=1, keep=0.45)
    with sk.backend("reference"):
        expected = ours(images())
    torch.testing.assert_close(PlainPruning(vit, 1, 0.45)(images()), expected)
    monkeypatch.setattr(Tensor, "topk", lambda x, k: torch.topk(-x, k))
    assert not torch.allclose(PlainPruning(vit, 1, 0.45)(images()), expected)


@pytest.mark.parametrize("cls", [PlainViT, partial(Evit, blocks=(1,), keep=0.5), partial(Tome, r=2)])
def test_other_ways_refuse_rotary_positions(cls: Any) -> None:
    with pytest.raises(TypeError, match="got Eva"):
        cls(small_eva(EVAS[0]))


@torch.no_grad()
def test_a_number_of_patches_in_place_of_the_share() -> None:
    plain = PlainPruning(small_vit(), 1, 0.45)
    assert torch.equal(plain(images(), 12), plain(images()))  # 11.25 of 25
    assert not torch.allclose(plain(images(), 13), plain(images()))


def test_gated_attention_is_refused() -> None:
    vit = small_vit()
    vit.blocks[0].attn.gate = torch.nn.Linear(64, 64)
    with pytest.raises(ValueError, match="gate"):
        PlainViT(vit)


@torch.no_grad()
def test_evit_appends_the_dropped_tokens_weighted_by_their_scores() -> None:
    """One image and one block, written as a loop over its patches."""
    vit = small_vit(depth=1)
    block, seen = vit.blocks[0], []
    block.norm2.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    vit(images(1))
    Evit(vit, (0,), 0.2)(images(1))
    everything, reduced = seen[0][0], seen[1][0]  # behind the attention of the block
    q, k, _ = qkv_of(vit)
    scores = (q[:, :1] @ k.transpose(1, 2) * block.attn.scale).softmax(-1).mean(0)[0]
    best = sorted(range(1, 26), key=lambda token: -scores[token])
    kept = sorted(best[:5])
    fused = sum(scores[token] * everything[token] for token in best[5:])
    torch.testing.assert_close(reduced, torch.stack([everything[0], *(everything[token] for token in kept), fused]))


def qkv_of(vit: Any) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (H, N, D) of the first block, for the first image."""
    attn = vit.blocks[0].attn
    x = vit.blocks[0].norm1(vit._pos_embed(vit.patch_embed(images(1))))
    return attn.qkv(x)[0].unflatten(1, (3, attn.num_heads, attn.head_dim)).permute(1, 2, 0, 3).unbind(0)


def test_merging_takes_the_most_alike_pair_and_the_mean_by_size() -> None:
    x = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    x[0, 4] = 2 * x[0, 1]  # alike by the cosine, at an even and at an odd place
    size = torch.tensor([[1.0, 1.0, 1.0, 1.0, 3.0, 1.0]])
    merged, sizes = merge(x, size, x, 1, 0)
    torch.testing.assert_close(
        merged[0], torch.stack([x[0, 0], x[0, 2], (3 * x[0, 4] + x[0, 1]) / 4, x[0, 3], x[0, 5]])
    )
    assert sizes.tolist() == [[1, 1, 4, 1, 1]]


def test_prefix_tokens_have_places_but_stay() -> None:
    x = torch.randn(1, 8, 4, generator=torch.Generator().manual_seed(0))
    x[0, 0], x[0, 1], x[0, 7] = x[0, 3], x[0, 4], x[0, 2]  # a prefix token is like a patch, at the other kind of place
    merged, sizes = merge(x, torch.ones(1, 8), x, 2, 2)
    assert torch.equal(merged[0, :2], x[0, :2])
    assert sizes[0, :2].tolist() == [1, 1]
    assert sizes.sum() == 8
    assert merged.shape[1] == 6


@pytest.mark.parametrize("pairs", [1, 5, 12])
def test_merging_loses_nothing(pairs: int) -> None:
    """Several may merge into one: what is conserved is the sum of the tokens, each times its size."""
    x = torch.randn(3, 25, 8, dtype=torch.double)
    size = torch.rand(3, 25, dtype=torch.double) + 1
    merged, sizes = merge(x, size, x, pairs, 1)
    assert merged.shape == (3, 25 - pairs, 8)
    torch.testing.assert_close(sizes.sum(1), size.sum(1))
    torch.testing.assert_close((merged * sizes[:, :, None]).sum(1), (x * size[:, :, None]).sum(1))


@torch.no_grad()
def test_merging_equal_tokens_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token of size 2 counts twice in every softmax: where all patches are equal pairs, the logits are the same.

    Of two blocks: what the second one merges, behind its attention, the class token never sees.
    """
    vit = small_vit(img_size=(16, 64), depth=2)
    vit.pos_embed.zero_()
    patches = torch.randn(1, 3, 16, 32, dtype=torch.double)
    picture = patches.unflatten(3, (2, 16)).repeat_interleave(2, dim=3).flatten(3)  # a a b b
    expected = vit(picture)
    torch.testing.assert_close(Tome(vit, 2)(picture), expected)
    monkeypatch.setattr(Tensor, "log", lambda size: size * 0)  # without the sizes in the softmax it is not the same
    assert not torch.allclose(Tome(vit, 2)(picture), expected)


@pytest.mark.parametrize("name", ["timm", "plain", "evit", "tome", "ours-dense", "ours"])
@torch.no_grad()
def test_rows_are_those_that_are_computed(name: str) -> None:
    made = PEERS[name].make(setting())
    entering, left = [], []
    vit = getattr(made.forward, "vit", made.forward)
    for block in vit.blocks:
        block.attn.qkv.register_forward_pre_hook(lambda module, inputs: entering.append(inputs[0].shape[1]))
        block.mlp.fc1.register_forward_pre_hook(lambda module, inputs: left.append(inputs[0].shape[1]))
    with sk.backend("reference"):
        logits = made.forward(images())
    assert logits.shape == (3, 24)
    assert [(rows.entering, rows.left) for rows in made.rows] == list(zip(entering, left, strict=True))


@pytest.mark.parametrize("name", ["evit", "tome"])
@torch.no_grad()
def test_ours_is_the_same_method(name: str) -> None:
    in_torch, ours = (PEERS[peer].make(setting()) for peer in (name, f"ours-{name}"))
    assert PEERS[f"ours-{name}"].in_torch == name
    assert ours.rows == in_torch.rows
    with sk.backend("reference"):
        torch.testing.assert_close(ours.forward(images()), in_torch.forward(images()))


@pytest.mark.parametrize("name", ["evit", "tome"])
def test_settings_are_those_of_like_arithmetic(name: str) -> None:
    vit = setting(small_vit(img_size=160))
    ours, dense, other = (vit.gmac(PEERS[peer].make(vit).rows) for peer in ("ours", "timm", name))
    assert abs(other - ours) < 0.1 * (dense - ours)


def test_compiled_peers_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []

    def compiled(module: torch.nn.Module, mode: str) -> torch.nn.Module:
        modes.append(mode)
        return module

    monkeypatch.setattr(sait.bench.peers, "compiled", compiled)
    names = ["timm-compiled", "timm-autotuned", "plain-compiled", "plain-autotuned", "ours-compiled"]
    made = [PEERS[name].make(setting()).forward for name in names]
    assert modes == ["default", "max-autotune", "default", "max-autotune", "default"]
    kinds = [type(module).__name__ for module in made[2:]]
    assert kinds == ["PlainPruning", "PlainPruning", "SparseVisionTransformer"]


def test_a_peer_that_computes_less_names_its_dense_twin() -> None:
    for peer in PEERS.values():
        assert peer.dense is None or PEERS[peer.dense].dense is None
        assert (peer.dense is not None) == (peer.group != "dense" and "all tokens" not in peer.label)


@pytest.mark.parametrize("name", ["ours-dense", "ours", "ours-mass"])
def test_optimized_peers_are_the_same_models_optimized(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    optimized = []
    monkeypatch.setattr(sait.bench.peers, "optimize", lambda model: optimized.append(model) or model)
    made, twin = PEERS[name].make(setting()), PEERS[name.replace("ours", "ours-optimized")].make(setting())
    assert optimized == [twin.forward]
    assert (twin.plan, twin.rows) == (made.plan, made.rows)


def test_a_cpu_has_no_graphs() -> None:
    with pytest.raises(ValueError, match="GPU"):
        PEERS["ours-graphed"].make(setting())


ENGINES = [OpenVino, OnnxRuntime]


@pytest.mark.parametrize("engine", ENGINES)
def test_without_an_engine_the_reason_is_given(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, engine.package, None)
    with pytest.raises(RuntimeError, match=f"pip install {engine.package}"):
        engine(small_vit().float(), images().float())


@pytest.mark.parametrize("engine", ENGINES)
def test_threads_that_share_an_engine_do_not_share_a_request(engine: Any) -> None:
    """Each of two has the result of its own images, though both run at once."""
    pytest.importorskip(engine.package)
    vit = small_vit().float()
    made = engine(vit, images().float(), streams=2)
    batches = [images().float(), -images().float()]
    wrong: list[int] = []
    together = threading.Barrier(2, timeout=60)

    @torch.no_grad()
    def serve(at: int) -> None:
        expected = vit(batches[at])
        together.wait()
        for _ in range(20):
            if not torch.allclose(made(batches[at]), expected, rtol=1e-4, atol=1e-4):
                wrong.append(at)

    workers = [threading.Thread(target=serve, args=(at,)) for at in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_streams_share_the_threads_of_openvino() -> None:
    pytest.importorskip("openvino")
    with torch_threads(1):  # it takes no more threads than there are cores
        for streams in (1, 2):
            made = OpenVino(small_vit().float(), images().float(), streams)
            assert made.compiled.get_property("NUM_STREAMS") == streams
            assert made.compiled.get_property("INFERENCE_NUM_THREADS") == streams


@pytest.mark.parametrize("name", EVAS)
def test_positions_go_along_in_an_engine(name: str) -> None:
    pytest.importorskip("openvino")
    module = PlainPruning(small_eva(name).float(), 1, 0.45)
    with torch.inference_mode():
        made = OpenVino(module, images().float())
        for batch in (images().float(), images(1).float()):
            torch.testing.assert_close(made(batch), module(batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("pruned", [False, True])
def test_an_engine_is_what_it_was_made_of(engine: Any, pruned: bool) -> None:
    """Of any batch, too: the number of images is not one of the constants."""
    pytest.importorskip(engine.package)
    vit = small_vit().float()
    module = PlainPruning(vit, 1, 0.45) if pruned else vit
    before = copy.deepcopy(vit.state_dict())
    with torch.inference_mode():
        made = engine(module, images().float())
        for batch in (images().float(), images().float().repeat(3, 1, 1, 1)[:-1]):
            torch.testing.assert_close(made(batch), module(batch), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(before[name], tensor) for name, tensor in vit.state_dict().items())
