"""sait.optimize: the same results on packed weights, and only where nobody changed what a block does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import sait
import torch
import zoo
from helpers import assert_as_exact_as_torch, assert_same_bits
from torch import Tensor, nn

import sait_kernels as sk

PLAIN = ("vit", "distilled", "registers", "layerscale_qknorm", "gap", "no_embed_class", "hybrid")
REFUSED = ("clip", "gated", "swiglu", "swiglu_packed", "rms_norm", "scale_norms")
DENSITIES = ({"keep": 0.5}, {"mass": 0.8}, {"keep": 1.0})


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of outputs of each layer that runs on packed weights."""
    sizes: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        sizes.append(args[2])
        return packed_linear(*args, **kwargs)

    packed_linear = sk.packed_linear
    monkeypatch.setattr(sk, "packed_linear", counted)
    return sizes


def score_of(name: str) -> str:
    return "column" if name in zoo.NO_PREFIX else "cls"


def sparse(name: str, **density: Any) -> Any:
    return sait.sparsify(zoo.build(name), block=1, score=score_of(name), **(density or {"keep": 0.5}))


def small_vit(**density: Any) -> sait.SaitViT:
    torch.manual_seed(0)
    model = sait.SaitViT(img_size=80, embed_dim=64, depth=4, num_heads=2, num_classes=24, block=1, **density).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 8)
    return model


def same_choice(model: Any, want: list[sk.Selection]) -> bool:
    return all(torch.equal(a.indices, b.indices) for a, b in zip(sait.selections(model), want, strict=True))


def assert_same_results(model: Any, x: Tensor, calls: list[int]) -> None:
    """Optimised and not, both against float64, which the unoptimised model runs in plain torch."""
    wide = copy.deepcopy(model).double()
    with sk.backend("reference"):
        exact = wide(x.double())
    in_torch = model(x)
    chosen = sait.selections(model)
    assert same_choice(wide, chosen), "the inputs do not decide this choice in this dtype: change the seed"
    assert not calls
    got = sait.optimize(model)(x)
    assert len(calls) == 4 * len(model.blocks)
    assert same_choice(model, chosen)
    assert_as_exact_as_torch("logits", got, exact, in_torch)


@pytest.mark.parametrize("density", DENSITIES, ids=str)
@pytest.mark.parametrize("name", PLAIN)
@torch.no_grad()
def test_same_results(name: str, density: dict[str, float], calls: list[int]) -> None:
    assert_same_results(sparse(name, **density), zoo.images(name), calls)


@pytest.mark.parametrize("density", DENSITIES, ids=str)
@torch.no_grad()
def test_same_results_of_sait_vit(density: dict[str, float], calls: list[int]) -> None:
    assert_same_results(
        small_vit(**density), torch.randn(3, 3, 80, 80, generator=torch.Generator().manual_seed(1)), calls
    )


@torch.no_grad()
def test_without_biases(calls: list[int]) -> None:
    model = sparse("vit")
    for block in model.blocks:
        for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            layer.bias = None
    assert_same_results(model, zoo.images("vit"), calls)


@pytest.mark.parametrize("name", ["vit", "layerscale_qknorm"])
@torch.no_grad()
def test_bfloat16(name: str, calls: list[int]) -> None:
    """All tokens stay: in bfloat16 near-ties of the scores would be decided differently."""
    model, x = sparse(name, keep=1.0).bfloat16(), zoo.images(name).bfloat16()
    assert_same_results(model, x, calls)


@torch.no_grad()
def test_dense_stays_the_unpatched_model(calls: list[int]) -> None:
    x, want = zoo.images("vit"), zoo.build("vit")(zoo.images("vit"))
    model = sait.set_density(sait.optimize(sparse("vit")))
    assert_same_bits("logits", model(x), want)
    assert not calls


@pytest.mark.parametrize("name", REFUSED)
@torch.no_grad()
def test_other_blocks_run_as_they_are(name: str, calls: list[int]) -> None:
    model, x = sparse(name), zoo.images(name)
    want = model(x)
    assert_same_bits("logits", sait.optimize(model)(x), want)
    assert not calls


def in_place(weight: nn.Parameter) -> None:
    weight.mul_(-0.5)


def through_optimizer(weight: nn.Parameter) -> None:
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.1).step()


def new_data(weight: nn.Parameter) -> None:
    weight.data = -0.5 * weight.data


@pytest.mark.parametrize("change", [in_place, through_optimizer, new_data])
@pytest.mark.parametrize("path", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
@torch.no_grad()
def test_changed_weights_are_packed_anew(path: str, change: Callable[[nn.Parameter], None]) -> None:
    model, x = sait.optimize(sparse("vit", keep=1.0)), zoo.images("vit")
    before = model(x)
    change(model.blocks[2].get_submodule(path).weight)
    got = model(x)
    assert not torch.equal(got, before)
    assert_same_bits("logits", got, sait.optimize(copy.deepcopy(model))(x))


@torch.no_grad()
def test_other_parameters_and_loaded_states(calls: list[int]) -> None:
    model, other, x = sait.optimize(sparse("vit")), small_change(sparse("vit")), zoo.images("vit")
    model(x)
    for assign in (False, True):
        model.load_state_dict(other.state_dict(), assign=assign)
        assert_same_bits(f"assign={assign}", model(x), sait.optimize(copy.deepcopy(other))(x))
        other = small_change(other)
    model.blocks[0].attn.proj.weight = nn.Parameter(-model.blocks[0].attn.proj.weight)
    assert_same_bits("parameter", model(x), sait.optimize(copy.deepcopy(model))(x))
    assert len(calls) == 16 * 7


def small_change(model: Any) -> Any:
    changed = copy.deepcopy(model)
    for parameter in changed.parameters():
        parameter.mul_(1.01)
    return changed


def hooked(model: Any) -> None:
    model.blocks[0].mlp.act.register_forward_hook(lambda *_: None)


def own_forward(model: Any) -> None:
    norm = model.blocks[0].norm1
    norm.forward = nn.Identity().forward


def in_training(model: Any) -> None:
    model.blocks[0].attn.proj_drop.train()


def subclassed(model: Any) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model.blocks[0].attn.qkv.__class__ = Doubled


def tanh_gelu(model: Any) -> None:
    model.blocks[0].mlp.act.approximate = "tanh"


def other_drop(model: Any) -> None:
    model.blocks[0].attn.proj_drop = nn.Tanh().eval()


@pytest.mark.parametrize("change", [hooked, own_forward, in_training, subclassed, tanh_gelu, other_drop])
@torch.no_grad()
def test_a_changed_block_runs_as_it_is(change: Callable[[Any], None], calls: list[int]) -> None:
    model, x = sparse("vit", keep=1.0), zoo.images("vit")
    for block in model.blocks[1:]:
        block.norm1.register_forward_hook(lambda *_: None)
    change(model)
    want = model(x)
    assert_same_bits("logits", sait.optimize(model)(x), want)
    assert not calls


def test_weights_made_in_inference_mode_run_as_they_are(calls: list[int]) -> None:
    """They count no changes, so a packed one might be old. Weights made before are packed in inference mode, too."""
    with torch.inference_mode():
        model, x = sparse("vit"), zoo.images("vit")
        want = model(x)
        assert_same_bits("logits", sait.optimize(model)(x), want)
    assert not calls
    model = sait.optimize(sparse("vit"))
    with torch.inference_mode():
        got = model(x)
    assert len(calls) == 16
    with torch.no_grad():
        assert_same_bits("without inference mode", model(x), got)


def test_other_calls_run_the_modules(calls: list[int]) -> None:
    """Where a gradient is wanted, under autocast, in float64, and where another backend is forced."""
    model, x = sparse("vit"), zoo.images("vit")
    want = model(x)
    sait.optimize(model)
    assert_same_bits("with gradients", model(x), want)
    with torch.no_grad():
        with torch.autocast("cpu"):
            model(x)
        with sk.backend("reference"):
            model(x)
            sait.optimize(copy.deepcopy(model).double())(x.double())
        assert not calls
        model(x)
        assert len(calls) == 16


@torch.no_grad()
def test_state_copies_and_undoing(calls: list[int]) -> None:
    plain, x = sparse("vit"), zoo.images("vit")
    want, keys = plain(x), list(plain.state_dict())
    model = sait.optimize(plain)
    model(x)
    assert list(model.state_dict()) == keys
    twin = copy.deepcopy(model)
    assert_same_bits("copy", twin(x), model(x))
    assert len(calls) == 3 * 16
    assert_same_bits("undone", sait.deoptimize(model)(x), want)
    sait.restore(twin)
    assert not any("packed" in name for block in twin.blocks for name in vars(block))
    assert len(calls) == 3 * 16


@pytest.mark.parametrize("call", [sait.optimize, sait.deoptimize])
def test_only_sparse_models(call: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=r"optimize: model: expected a sparse model, got VisionTransformer"):
        call(zoo.build("vit"))
