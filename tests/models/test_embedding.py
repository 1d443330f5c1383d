"""The patch embedding of an optimised model: packed where it is a plain convolution, its modules where it is not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import sait
import test_eva
import torch
import zoo
from helpers import assert_as_exact_as_torch, assert_same_bits
from optimized import small_vit, sparse
from sait.execution.embedding import embed as embedded
from sait.execution.encoder import all_packed
from sait.tokens import Tokens
from torch import Tensor, nn

import sait_kernels as sk

# Convolutions in front; images of another size than the model's; blocks that run their modules.
BY_MODULES = ("hybrid", "vitamin", "dynamic", "gated", "rms_norm")


def embed(model: Any, x: Tensor) -> Tokens:
    family = type(model)._sait_family
    return embedded(model, family, x, all_packed(model, family, x) is not None)


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of images of each call of the op."""
    images, embed = [], sk.packed_embed

    def noted(*args: Any, **options: Any) -> Any:
        images.append(len(args[0]))
        return embed(*args, **options)

    monkeypatch.setattr(sk, "packed_embed", noted)
    return images


def check_as_its_modules(model: Any, x: Tensor) -> None:
    """What enters the first block is what the modules compute, as exactly as they do."""
    family = type(model)._sait_family
    got, wanted = embed(model, x), family.embed(model, x)
    wide = copy.deepcopy(model).double()
    if getattr(wide, "rope_mixed", False):
        wide.rope.float()  # as test_eva.typed says
    exact = family.embed(wide, x.double())
    assert_as_exact_as_torch("tokens", got.x, exact.x, wanted.x)
    assert torch.equal(got.cu_seqlens, wanted.cu_seqlens)
    assert got[2:6] == wanted[2:6]
    for ours, theirs in zip(tables_of(got), tables_of(wanted), strict=True):
        assert torch.equal(ours, theirs)


def tables_of(tokens: Any) -> tuple[Tensor, ...]:
    """And the positions that they are read at."""
    if tokens.rope is None:
        return ()
    return *(tokens.rope if isinstance(tokens.rope, tuple) else (tokens.rope,)), tokens.positions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", zoo.ZOO)
@torch.no_grad()
def test_timm(name: str, dtype: torch.dtype, packed: list[int]) -> None:
    model, x = sait.optimize(sparse(name).to(dtype)), zoo.images(name).to(dtype)
    check_as_its_modules(model, x)
    assert packed == ([] if name in BY_MODULES else [3])


@pytest.mark.parametrize("name", test_eva.EVA)
@torch.no_grad()
def test_eva_and_its_tables(name: str, packed: list[int]) -> None:
    model = sait.optimize(sait.sparsify(test_eva.build(name), block=1, keep=0.5, score="column"))
    x = test_eva.images(name)
    check_as_its_modules(model, x)
    assert packed == ([] if name == "gated" else [len(x)])


@torch.no_grad()
def test_sait_vit_and_channels_last(packed: list[int]) -> None:
    model, x = sait.optimize(small_vit(keep=0.5)), torch.randn(2, 3, 80, 80)
    check_as_its_modules(model, x)
    assert_same_bits("logits", model(x.to(memory_format=torch.channels_last)), model(x))
    assert packed == [2, 2, 2]


@torch.no_grad()
def test_images_of_another_size(packed: list[int]) -> None:
    """Positions are for one size; rotary ones are made for any."""
    model, x = sait.optimize(sparse("dynamic")), torch.randn(2, 3, 48, 48)
    check_as_its_modules(model, x)
    assert packed == [2]
    check_as_its_modules(model, torch.randn(2, 3, 48, 64))
    with pytest.raises(AssertionError, match="divisible by patch size"):
        model(torch.randn(2, 3, 50, 48))
    assert packed == [2]
    model = sait.optimize(sait.sparsify(test_eva.build("dynamic"), block=1, keep=0.5))
    for height, width in ((48, 48), (80, 64)):
        check_as_its_modules(model, torch.randn(2, 3, height, width))
    assert packed == [2, 2, 2]


def another_projection(model: Any) -> None:
    model.patch_embed.proj = nn.Conv2d(3, 64, 16, 16).eval()


def other_positions(model: Any) -> None:
    model.pos_embed = nn.Parameter(torch.randn_like(model.pos_embed))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a class token in place": lambda model: model.cls_token.add_(1),
    "positions in place": lambda model: model.pos_embed.mul_(2),
    "a bias in place": lambda model: model.patch_embed.proj.bias.mul_(3),
    "weights past torch's count": lambda model: model.patch_embed.proj.weight.data.numpy().__imul__(2),
    "other positions": other_positions,
    "another projection": another_projection,
    "what positions are added to": lambda model: (
        setattr(model, "no_embed_class", True) or setattr(model, "pos_embed", nn.Parameter(model.pos_embed[:, 1:]))
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_change_is_followed(change: str, packed: list[int]) -> None:
    model, x = sait.optimize(sparse("vit")), zoo.images("vit")
    before = embed(model, x).x
    CHANGES[change](model)
    check_as_its_modules(model, x)
    assert not torch.equal(embed(model, x).x, before)
    assert packed == [3, 3, 3]


def test_whoever_trains_in_between() -> None:
    """After a forward with gradients it is packed anew, for not every update shows: here one value, past torch's count,
    between those that are sampled."""
    model, x = sait.optimize(sparse("vit")), zoo.images("vit")
    with torch.inference_mode():
        model(x)
    model(x)
    model.patch_embed.proj.weight.data.view(-1)[2] += 4
    with torch.no_grad():
        check_as_its_modules(model, x)


def count(calls: list[int]) -> Callable[..., None]:
    return lambda *_: calls.append(1)


LISTENERS: dict[str, Callable[[Any, list[int]], Any]] = {
    "of the convolution": lambda model, calls: model.patch_embed.proj.register_forward_hook(count(calls)),
    "of the patch embedding": lambda model, calls: model.patch_embed.register_forward_pre_hook(count(calls)),
    "of the dropout": lambda model, calls: model.pos_drop.register_forward_hook(count(calls)),
}


@pytest.mark.parametrize("where", LISTENERS)
@torch.no_grad()
def test_hooks_run(where: str, packed: list[int]) -> None:
    model, x, calls = sait.optimize(sparse("vit")), zoo.images("vit"), []
    model(x)
    hook = LISTENERS[where](model, calls)
    model(x)
    assert (len(calls), packed) == (1, [3])
    assert "hooks" in str(sait.explain(model).embedding)
    hook.remove()
    model(x)
    assert (len(calls), packed) == (1, [3, 3])
    assert sait.explain(model).embedding == ""


PLAIN_NO_MORE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "dropout": (lambda model: setattr(model, "pos_drop", nn.AlphaDropout(0.5).eval()), "it has a AlphaDropout"),
    "a norm": (lambda model: setattr(model.patch_embed, "norm", nn.LayerNorm(64)), "it has a LayerNorm"),
    "a stride": (lambda model: setattr(model.patch_embed.proj, "padding", (8, 8)), "has padding (8, 8)"),
    "train mode": (lambda model: model.patch_embed.train(), "train mode"),
    "doubles": (lambda model: setattr(model, "pos_embed", nn.Parameter(model.pos_embed.double())), "several types"),
}


@pytest.mark.parametrize("change", PLAIN_NO_MORE)
@torch.no_grad()
def test_what_is_not_plain_runs_its_modules(change: str, packed: list[int]) -> None:
    model = sait.optimize(sparse("vit"))
    apply, reason = PLAIN_NO_MORE[change]
    apply(model)
    assert reason in str(sait.explain(model).embedding)
    with torch.no_grad():
        try:
            embed(model, zoo.images("vit"))
        except RuntimeError:
            assert change == "a stride", "more patches than positions: the modules say so"
    assert packed == []


def test_training_and_dense_run_modules(packed: list[int]) -> None:
    model, x = sait.optimize(sparse("vit")), zoo.images("vit")
    model(x).sum().backward()
    assert model.patch_embed.proj.weight.grad is not None
    with torch.no_grad():
        sait.set_density(model)(x)
        sait.deoptimize(sait.set_density(model, keep=0.5))(x)
    assert packed == []
