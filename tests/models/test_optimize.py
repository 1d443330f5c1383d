"""sait.optimize: the same results by fused products, and only where nobody changed what a block does.

On a CPU these are of packed weights. Triton's kernels, here in its interpreter, are what a GPU runs.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sait
import torch
import zoo
from helpers import assert_as_exact_as_torch, assert_same_bits
from sait.optimize import FusedLayers, PackedLayers, optimized_layers
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import sait_kernels as sk

PLAIN = ("vit", "distilled", "registers", "layerscale_qknorm", "gap", "no_embed_class", "hybrid")
REFUSED = ("clip", "gated", "swiglu", "swiglu_packed", "rms_norm", "scale_norms")
DENSITIES = ({"keep": 0.5}, {"mass": 0.8}, {"keep": 1.0})
STATIC = {"mass": 0.8, "max_keep": 18, "static": True}
IN_INTERPRETER = (
    ("vit", STATIC),
    ("distilled", {"keep": 0.5}),
    ("registers", STATIC),
    ("layerscale_qknorm", {"mass": 0.8}),
    ("gap", {"keep": 0.5}),
)
# What a block calls, on packed weights and on its own.
PACKED = ["packed_linear", "packed_block"]
FUSED = ["norm_linear", "linear_residual"] * 2


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the name of each op that runs in the place of linear layers."""
    names: list[str] = []

    def note(name: str, op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def noted(*args: Any, **kwargs: Any) -> Tensor:
            names.append(name)
            return op(*args, **kwargs)

        return noted

    for name in {*PACKED, *FUSED}:
        monkeypatch.setattr(sk, name, note(name, getattr(sk, name)))
    return names


@pytest.fixture
def on_triton() -> Iterator[None]:
    with sk.backend("triton"):
        yield


@pytest.fixture(params=["cpu", "triton"])
def ops(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """What each optimised block calls; as a CPU chooses, and as a GPU would."""
    with sk.backend("triton") if request.param == "triton" else contextlib.nullcontext():
        yield FUSED if request.param == "triton" else PACKED


def score_of(name: str) -> str:
    return "column" if name in zoo.NO_PREFIX else "cls"


def sparse(name: str, **density: Any) -> Any:
    stage = sait.Stage(1, **(density or {"keep": 0.5}))
    return sait.sparsify(zoo.build(name), sait.Plan([stage], score_of(name)))


def small_vit(**density: Any) -> sait.SaitViT:
    torch.manual_seed(0)
    model = sait.SaitViT(img_size=80, embed_dim=64, depth=4, num_heads=2, num_classes=24, block=1, **density).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 8)
    return model


def shortened(model: Any) -> Any:
    """Of two blocks: the interpreter and the compiler take their time."""
    model.blocks = model.blocks[:2]
    return model


def same_choice(model: Any, want: list[sk.Selection]) -> bool:
    return all(torch.equal(a.indices, b.indices) for a, b in zip(sait.selections(model), want, strict=True))


def assert_same_results(model: Any, x: Tensor, calls: list[str], ops: list[str] = PACKED) -> None:
    """Optimised and not, both against float64, which the unoptimised model runs in plain torch."""
    wide = copy.deepcopy(model).double()
    with sk.backend("reference"):
        exact = wide(x.double())
    in_torch = model(x)
    chosen = sait.selections(model)
    assert same_choice(wide, chosen), "the inputs do not decide this choice in this dtype: change the seed"
    assert not calls
    got = sait.optimize(model)(x)
    assert calls == ops * len(model.blocks)
    assert same_choice(model, chosen)
    assert_as_exact_as_torch("logits", got, exact, in_torch)


@pytest.mark.parametrize("density", DENSITIES, ids=str)
@pytest.mark.parametrize("name", PLAIN)
@torch.no_grad()
def test_same_results(name: str, density: dict[str, float], calls: list[str]) -> None:
    assert_same_results(sparse(name, **density), zoo.images(name), calls)


@pytest.mark.parametrize(("name", "density"), IN_INTERPRETER, ids=str)
@torch.no_grad()
def test_same_results_on_triton(name: str, density: dict[str, Any], on_triton: None, calls: list[str]) -> None:
    assert_same_results(sparse(name, **density), zoo.images(name), calls, FUSED)


@pytest.mark.parametrize("density", DENSITIES, ids=str)
@torch.no_grad()
def test_same_results_of_sait_vit(density: dict[str, float], ops: list[str], calls: list[str]) -> None:
    x = torch.randn(3, 3, 80, 80, generator=torch.Generator().manual_seed(1))
    assert_same_results(small_vit(**density), x, calls, ops)


@torch.no_grad()
def test_without_biases(ops: list[str], calls: list[str]) -> None:
    model = sparse("vit")
    for block in model.blocks:
        for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            layer.bias = None
    assert_same_results(model, zoo.images("vit"), calls, ops)


@pytest.mark.parametrize("name", ["vit", "layerscale_qknorm"])
@torch.no_grad()
def test_bfloat16(name: str, calls: list[str]) -> None:
    """All tokens stay: in bfloat16 near-ties of the scores would be decided differently."""
    model, x = sparse(name, keep=1.0).bfloat16(), zoo.images(name).bfloat16()
    assert_same_results(model, x, calls)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_16_bits_on_triton(dtype: torch.dtype, on_triton: None, calls: list[str]) -> None:
    model, x = sparse("layerscale_qknorm", keep=1.0).to(dtype), zoo.images("layerscale_qknorm").to(dtype)
    assert_same_results(model, x, calls, FUSED)


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of rows that each attention leaves."""
    rows: list[int] = []

    def note(out: Any) -> Any:
        rows.append(len(out[0] if isinstance(out, tuple) else out))
        return out

    attend, prune = sk.compact_attention, sk.prune_attention
    monkeypatch.setattr(sk, "compact_attention", lambda *args, **kwargs: note(attend(*args, **kwargs)))
    monkeypatch.setattr(sk, "prune_attention", lambda *args, **kwargs: note(prune(*args, **kwargs)))
    return rows


@pytest.mark.parametrize(("name", "prefix"), [("vit", 1), ("distilled", 2), ("registers", 5), ("gap", None)])
@pytest.mark.parametrize("density", [*DENSITIES, STATIC], ids=str)
@torch.no_grad()
def test_the_last_block_is_for_the_head(
    name: str, prefix: int | None, density: dict[str, Any], attended: list[int]
) -> None:
    """It leaves the rows that the head reads, to the bit as if all were there; features have all of them."""
    model, x = sait.optimize(sparse(name, **density)), zoo.images(name)
    got = model(x)
    *_, before, last = attended
    assert last == (before if prefix is None else 3 * prefix)
    features = model.forward_features(x)
    assert attended[-1] == attended[-2] == before
    if "mass" not in density:
        assert_same_bits("logits", got, model.forward_head(features))


@torch.no_grad()
def test_a_last_block_that_drops_some(attended: list[int]) -> None:
    model = sait.sparsify(zoo.build("vit"), block=3, keep=0.4)
    sait.optimize(model)(zoo.images("vit"))
    assert attended == [78, 78, 78, 33]  # of three images: 25 patches, of which 10 stay, and the class token


@torch.no_grad()
def test_dense_stays_the_unpatched_model(calls: list[str]) -> None:
    x, want = zoo.images("vit"), zoo.build("vit")(zoo.images("vit"))
    model = sait.set_density(sait.optimize(sparse("vit")))
    assert_same_bits("logits", model(x), want)
    assert not calls


@pytest.mark.parametrize("name", REFUSED)
@torch.no_grad()
def test_other_blocks_run_as_they_are(name: str, ops: list[str], calls: list[str]) -> None:
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
def test_other_parameters_and_loaded_states(calls: list[str]) -> None:
    model, other, x = sait.optimize(sparse("vit")), small_change(sparse("vit")), zoo.images("vit")
    model(x)
    for assign in (False, True):
        model.load_state_dict(other.state_dict(), assign=assign)
        assert_same_bits(f"assign={assign}", model(x), sait.optimize(copy.deepcopy(other))(x))
        other = small_change(other)
    model.blocks[0].attn.proj.weight = nn.Parameter(-model.blocks[0].attn.proj.weight)
    assert_same_bits("parameter", model(x), sait.optimize(copy.deepcopy(model))(x))
    assert len(calls) == 8 * 7


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


def no_eps(model: Any) -> None:
    model.blocks[0].norm2.eps = 0.0


def other_drop(model: Any) -> None:
    model.blocks[0].attn.proj_drop = nn.Tanh().eval()


CHANGES = (hooked, own_forward, in_training, subclassed, tanh_gelu, no_eps, other_drop)


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_changed_block_runs_as_it_is(change: Callable[[Any], None], ops: list[str], calls: list[str]) -> None:
    model, x = sparse("vit", keep=1.0), zoo.images("vit")
    for block in model.blocks[1:]:
        block.norm1.register_forward_hook(lambda *_: None)
    change(model)
    want = model(x)
    assert_same_bits("logits", sait.optimize(model)(x), want)
    assert not calls


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_change_after_packing_is_noticed(change: Callable[[Any], None], calls: list[str]) -> None:
    model, x = sait.optimize(sparse("vit", keep=1.0)), zoo.images("vit")
    before = model(x)
    assert calls == PACKED * 4
    change(model)
    got = model(x)
    assert calls == PACKED * 7, "the changed block runs its modules, and the others are still packed"
    assert_same_bits("logits", got, sait.optimize(copy.deepcopy(model))(x))
    assert torch.allclose(got, before, atol=3e-5) == (
        change in (hooked, in_training, no_eps)
    )  # which do next to nothing


def test_weights_made_in_inference_mode(calls: list[str]) -> None:
    """By model.bfloat16(), for instance. They count no changes: after one it takes another optimize."""
    with torch.inference_mode():
        model, x = sparse("vit").bfloat16(), zoo.images("vit").bfloat16()
        assert model.blocks[0].attn.qkv.weight.is_inference()
        before = sait.optimize(model)(x)
        assert calls == PACKED * 4
        model.blocks[0].attn.qkv.weight.mul_(-0.5)
        after = sait.optimize(model)(x)
        assert not torch.equal(after, before)
        assert_same_bits("packed anew", after, sait.optimize(copy.deepcopy(model))(x))


def test_packed_with_and_without_inference_mode(calls: list[str]) -> None:
    model, x = sait.optimize(sparse("vit")), zoo.images("vit")
    with torch.inference_mode():
        got = model(x)
    with torch.no_grad():
        assert_same_bits("without inference mode", model(x), got)
    assert calls == PACKED * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_cpu_that_multiplies_tiles_of_bfloat16(
    dtype: torch.dtype, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leaves them to oneDNN, which does that."""
    monkeypatch.setattr(sys.modules["sait.optimize"], "_has_amx", lambda: True)
    model, x = sparse("vit", keep=1.0).to(dtype), zoo.images("vit").to(dtype)
    want = model(x)
    got = sait.optimize(model)(x)
    assert bool(calls) == (dtype == torch.float32)
    assert dtype == torch.float32 or torch.equal(got, want)


def test_other_calls_run_the_modules(ops: list[str], calls: list[str]) -> None:
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
        assert calls == ops * 4


@torch.no_grad()
def test_fused_products_read_the_weights_at_each_call(on_triton: None, calls: list[str]) -> None:
    """However they were changed: nothing is kept of them."""
    with torch.inference_mode():
        model, x = sait.optimize(shortened(sparse("vit", keep=1.0))), zoo.images("vit", 1)
        before = model(x)
        for path in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
            model.blocks[0].get_submodule(path).weight.numpy()[...] *= -0.5
            got = model(x)
            assert not torch.equal(got, before), path
            assert_same_bits(path, got, sait.optimize(copy.deepcopy(model))(x))
            before = got
    assert calls == FUSED * 2 * 9


def transposed(module: nn.Linear) -> None:
    module.weight = nn.Parameter(module.weight.T.contiguous().T)


def of_another_class(module: nn.Linear) -> None:
    class Quantised(nn.Parameter):
        pass

    module.weight = Quantised(module.weight)


@pytest.mark.parametrize("change", [transposed, of_another_class])
@pytest.mark.parametrize("path", ["attn.qkv", "mlp.fc2"])
@torch.no_grad()
def test_weights_that_are_not_fused(
    path: str, change: Callable[[nn.Linear], None], on_triton: None, calls: list[str]
) -> None:
    model, x = sparse("vit", keep=1.0), zoo.images("vit")
    for block in model.blocks:
        change(block.get_submodule(path))
    want = model(x)
    assert_same_bits("logits", sait.optimize(model)(x), want)
    assert not calls


@pytest.mark.parametrize(
    ("device", "dtype", "forced", "want"),
    [
        ("cpu", torch.float32, None, PackedLayers),
        ("cpu", torch.float16, None, None),
        ("cpu", torch.float32, "triton", FusedLayers),
        ("cuda", torch.float32, None, FusedLayers),
        ("cuda", torch.bfloat16, None, FusedLayers),
        ("cuda", torch.float16, "triton", FusedLayers),
        ("cuda", torch.float64, None, None),
        ("cuda", torch.float32, "cpu", None),
        ("cuda", torch.float32, "reference", None),
    ],
)
@torch.no_grad()
def test_the_device_decides(device: str, dtype: torch.dtype, forced: str | None, want: type | None) -> None:
    """A GPU's tensors are fake here. What no kernel would serve is left to the modules."""
    (block, *_) = sait.optimize(sparse("vit")).to(dtype).blocks
    fake = FakeTensorMode() if device == "cuda" else contextlib.nullcontext()
    with fake, sk.backend(forced) if forced else contextlib.nullcontext():
        layers = optimized_layers(block, torch.empty(3, 26, 64, device=device, dtype=dtype))
    assert type(layers) is (want or type(None))


@pytest.mark.parametrize("name", ["vit", "siglip"])
@torch.no_grad()
def test_no_size_depends_on_data(name: str, on_triton: None, calls: list[str]) -> None:
    """Fake tensors have none: whatever would wait for a GPU raises."""
    model = sait.optimize(sait.sparsify(zoo.build(name), zoo.static_plan(score_of(name))))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model(mode.from_tensor(zoo.images(name))).shape == (3, 24)
    assert calls == FUSED * 4


@pytest.mark.parametrize("build", [lambda: sparse("layerscale_qknorm", **STATIC), small_vit], ids=["timm", "SaitViT"])
@torch.no_grad()
def test_compiled_on_triton(build: Callable[[], Any], on_triton: None) -> None:
    """One graph for every batch size, of the same fused products."""
    model = sait.optimize(shortened(build()))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for count in (3, 2):
        x = zoo.images("vit", count, seed=count)
        torch._dynamo.mark_dynamic(x, 0)
        assert_same_bits(f"{count} images", compiled(x), model(x))
    (graph,) = counter.graphs
    targets = [str(node.target) for node in graph.graph.nodes]
    assert [name for target in targets for name in set(FUSED) if name in target] == FUSED * 2


@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_exported_programs_have_the_modules(strict: bool, on_triton: None) -> None:
    model, x = shortened(sparse("vit")), zoo.images("vit")
    want = torch.export.export(model, (x,), strict=strict)
    got = torch.export.export(sait.optimize(model), (x,), strict=strict)
    assert [str(node.target) for node in got.graph.nodes] == [str(node.target) for node in want.graph.nodes]


@torch.no_grad()
def test_state_copies_and_undoing(calls: list[str]) -> None:
    plain, x = sparse("vit"), zoo.images("vit")
    want, keys = plain(x), list(plain.state_dict())
    model = sait.optimize(plain)
    model(x)
    assert list(model.state_dict()) == keys
    twin = copy.deepcopy(model)
    assert_same_bits("copy", twin(x), model(x))
    assert len(calls) == 3 * 8
    assert_same_bits("undone", sait.deoptimize(model)(x), want)
    sait.restore(twin)
    assert not any("optimized" in name for block in twin.blocks for name in vars(block))
    assert len(calls) == 3 * 8


@pytest.mark.parametrize("call", [sait.optimize, sait.deoptimize])
def test_only_sparse_models(call: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=r"optimize: model: expected a sparse model, got VisionTransformer"):
        call(zoo.build("vit"))
