"""sait.optimize: the same results by fused GEMMs, and only where nobody changed what a block does.

On a CPU these are of packed weights. Triton's kernels, here in its interpreter, are what a GPU runs.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import sait
import test_eva as eva
import torch
import zoo
from helpers import assert_model_as_exact_as_torch, assert_same_bits
from optimized import DENSITIES, FUSED, PACKED, STATIC, score_of, shortened, small_vit, sparse
from sait.execution.optimize import FusedBlock, PackedBlock, block_for, gemms_for
from sait.execution.plain import PlainBlock
from sait.families.timm_vit import TIMM_VIT
from tiers import full_only
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import sait_kernels as sk

PLAIN = ("vit", "distilled", "registers", "layerscale_qknorm", "gap", "no_embed_class", "hybrid")
# Other activations, gates in one layer and in two, LayerNorms inside.
OTHER_MLPS = ("clip", "swiglu_packed", "swiglu", "scale_norms")
ROTARY = ("dinov3", "dinov3_qkvb", "dinov3_swiglu", "eva02", "eva02_clip", "eva_clip", "pe", "rope_mixed")
IN_INTERPRETER = (
    ("vit", STATIC),
    ("distilled", {"keep": 0.5}),
    ("registers", STATIC),
    ("layerscale_qknorm", {"mass": 0.8}),
    ("gap", {"keep": 0.5}),
)


def same_choice(model: Any, want: list[sk.Selection]) -> bool:
    return all(torch.equal(a.indices, b.indices) for a, b in zip(sait.selections(model), want, strict=True))


def assert_same_results(model: Any, x: Tensor, calls: list[str], ops: list[str] = PACKED) -> None:
    """Optimised and not, both against float64, which the unoptimised model runs in plain torch."""
    wide = eva.typed(model, torch.float64) if hasattr(model, "rope_mixed") else copy.deepcopy(model).double()
    with sk.backend("reference"):
        exact = wide(x.double())
    plain = copy.deepcopy(model)
    model(x)
    chosen = sait.selections(model)
    assert same_choice(wide, chosen), "the inputs do not decide this choice in this dtype: change the seed"
    assert not calls
    got = sait.optimize(model)(x)
    assert calls == ops * len(model.blocks)
    assert same_choice(model, chosen)
    assert_model_as_exact_as_torch("logits", got, exact, partial(plain, x))


@pytest.mark.parametrize("density", DENSITIES, ids=str)
@pytest.mark.parametrize("name", PLAIN)
@torch.no_grad()
def test_same_results(name: str, density: dict[str, float], calls: list[str]) -> None:
    assert_same_results(sparse(name, **density), zoo.images(name), calls)


@pytest.mark.parametrize("name", OTHER_MLPS)
@torch.no_grad()
def test_other_mlps(name: str, calls: list[str]) -> None:
    assert_same_results(sparse(name, keep=0.5), zoo.images(name), calls)


@full_only(lambda name: name != "swiglu_packed")
@pytest.mark.parametrize("name", OTHER_MLPS)
@torch.no_grad()
def test_other_mlps_on_triton(name: str, on_triton: None, calls: list[str]) -> None:
    assert_same_results(shortened(sparse(name, keep=0.5)), zoo.images(name), calls, FUSED)


@pytest.mark.parametrize("name", ROTARY)
@torch.no_grad()
def test_rotary_models(name: str, calls: list[str]) -> None:
    model = sait.sparsify(eva.build(name), block=1, keep=0.5)
    assert_same_results(model, eva.images(name), calls)
    calls.clear()
    assert_same_results(sait.set_density(sait.deoptimize(model), mass=0.8), eva.images(name), calls)


@full_only(lambda name: name not in ("dinov3_qkvb", "eva02_clip"))
@pytest.mark.parametrize("name", ROTARY)
@torch.no_grad()
def test_rotary_models_on_triton(name: str, on_triton: None, calls: list[str]) -> None:
    model = shortened(sait.sparsify(eva.build(name), block=1, keep=0.5))
    projections = 3 if model.blocks[0].attn.qkv is None else 1
    assert_same_results(model, eva.images(name), calls, ["norm_linear"] * projections + FUSED[1:])


@torch.no_grad()
def test_parameters_that_no_module_applies(ops: list[str], calls: list[str]) -> None:
    """Vectors of LayerScale, biases of a projection beside it, a gate that is half of a layer: changed in place or
    replaced, they count from the next forward on."""
    for name in ("dinov3_qkvb", "eva02"):
        model, x = shortened(sait.sparsify(eva.build(name), block=1, keep=1.0)), eva.images(name)
        plain = sait.sparsify(shortened(eva.build(name)), block=1, keep=1.0)
        sait.optimize(model)(x)

        def in_place(vit: Any) -> None:
            block = vit.blocks[1]
            for tensor in (block.gamma_1, block.attn.q_bias, block.attn.k_bias, block.mlp.fc1.weight):
                if tensor is not None:
                    tensor.mul_(1.5).add_(0.1)

        def replaced(vit: Any) -> None:
            block = vit.blocks[0]
            for owner, path in ((block, "gamma_2"), (block.attn, "v_bias"), (block.mlp.fc1, "weight")):
                if getattr(owner, path) is not None:
                    setattr(owner, path, torch.nn.Parameter(getattr(owner, path) * 0.5))

        for change in (in_place, replaced):
            before = model(x)
            change(model)
            change(plain)
            calls.clear()
            got = model(x)
            assert calls, "it ran its modules"
            assert not torch.allclose(got, before, atol=1e-2)
            torch.testing.assert_close(got, plain(x), rtol=0, atol=2e-4)
        calls.clear()


@full_only(lambda name, density: name not in ("distilled", "layerscale_qknorm"))
@pytest.mark.parametrize(("name", "density"), IN_INTERPRETER, ids=str)
@torch.no_grad()
def test_same_results_on_triton(name: str, density: dict[str, Any], on_triton: None, calls: list[str]) -> None:
    assert_same_results(sparse(name, **density), zoo.images(name), calls, FUSED)


@full_only(lambda density, ops: ops == "triton" and "mass" not in density)
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


@torch.no_grad()
def test_a_share_of_what_a_mass_left(calls: list[str]) -> None:
    """Images of unequal lengths stay so, whatever the later stage."""
    model = zoo.build("vit")
    sait.sparsify(model, sait.Plan([sait.Stage(0, mass=0.8), sait.Stage(2, keep=0.5)]))
    assert_same_results(model, zoo.images("vit"), calls)


@pytest.mark.parametrize("name", ["vit", "layerscale_qknorm"])
@torch.no_grad()
def test_bfloat16(name: str, calls: list[str]) -> None:
    """All tokens stay: in bfloat16 near-ties of the scores would be decided differently."""
    model, x = sparse(name, keep=1.0).bfloat16(), zoo.images(name).bfloat16()
    assert_same_results(model, x, calls)


@full_only(lambda dtype: dtype == torch.float16)
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
    encode = sk.packed_encoder

    def all_noted(*args: Any, **options: Any) -> Any:
        out, kept = encode(*args, **options)
        left, count = len(args[0]), len(args[3].blocks)
        pairs = zip(options["stages"], kept, strict=False)  # of the prefix rows there may be one more
        behind = {stage.block: len(selection.indices) for stage, selection in pairs}
        for block in range(count):
            left = len(out) if block == count - 1 else behind.get(block, left)
            rows.append(left)
        return out, kept

    monkeypatch.setattr(sk, "packed_encoder", all_noted)
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


@pytest.mark.parametrize(
    ("device", "dtype", "forced", "want"),
    [
        ("cpu", torch.float32, None, PackedBlock),
        ("cpu", torch.float16, None, None),
        ("cpu", torch.float32, "triton", FusedBlock),
        ("cuda", torch.float32, None, FusedBlock),
        ("cuda", torch.bfloat16, None, FusedBlock),
        ("cuda", torch.float16, "triton", FusedBlock),
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
        x = torch.empty(3, 26, 64, device=device, dtype=dtype)
        made = block_for(block, TIMM_VIT, gemms_for(x), x)
    assert type(made) is (want or PlainBlock)


@pytest.mark.parametrize("name", ["vit", "siglip"])
@torch.no_grad()
def test_no_size_depends_on_data(name: str, on_triton: None, calls: list[str]) -> None:
    """Fake tensors have none: whatever would wait for a GPU raises."""
    model = sait.optimize(sait.sparsify(zoo.build(name), zoo.static_plan(score_of(name))))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model(mode.from_tensor(zoo.images(name))).shape == (3, 24)
    assert calls == FUSED * 4


@full_only(lambda build: build is small_vit)
@pytest.mark.parametrize("build", [lambda: sparse("layerscale_qknorm", **STATIC), small_vit], ids=["timm", "SaitViT"])
@torch.no_grad()
def test_compiled_on_triton(build: Callable[[], Any], on_triton: None) -> None:
    """One graph for every batch size, of the same fused GEMMs."""
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
