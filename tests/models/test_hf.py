"""Hugging Face's transformers: encoders, the heads around them, and what stays transformers' own."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import io
import json
import pickle
from collections.abc import Iterator
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import sait
import torch
import zoo
from helpers import assert_model_as_exact_as_torch, assert_same_bits, run_python
from sait import checkpoint
from sait.families import family_of
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import sait_kernels as sk

transformers = pytest.importorskip("transformers", "5.18", reason="transformers 5.18 or newer is not installed")
from sait.families import hf  # noqa: E402

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "image_size": 80,
    "patch_size": 16,
    "num_labels": 7,
    "projection_dim": 24,
}
# name -> class, its configuration's class, and what is different from SMALL
HF: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("ViTForImageClassification", "ViTConfig", {}),
    "vit_encoder": ("ViTModel", "ViTConfig", {"qkv_bias": False}),
    "deit": ("DeiTForImageClassification", "DeiTConfig", {}),
    "deit_teacher": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", {}),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", {"mlp_ratio": 2}),
    "dinov2_swiglu": ("Dinov2Model", "Dinov2Config", {"mlp_ratio": 2, "use_swiglu_ffn": True}),
    "registers": ("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", {"mlp_ratio": 2}),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", {"num_register_tokens": 4}),
    "dinov3_gated": ("DINOv3ViTModel", "DINOv3ViTConfig", {"use_gated_mlp": True, "hidden_act": "silu"}),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", {}),
    "clip_projection": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", {}),
    "clip_classes": ("CLIPForImageClassification", "CLIPConfig", {}),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", {}),
    "siglip_classes": ("SiglipForImageClassification", "SiglipConfig", {}),
}
TRAINED = ("vit", "registers", "dinov3", "clip_projection", "siglip")  # one of each kind


def made(name: str, **changes: Any) -> Any:
    cls, config, different = HF[name]
    values = {**SMALL, **different, **changes}
    if config in ("CLIPConfig", "SiglipConfig"):
        labels = values.pop("num_labels")
        values = {"vision_config": values, "num_labels": labels}
    return getattr(transformers, cls)(getattr(transformers, config)(**values)).eval()


@functools.cache
def _built(name: str) -> Any:
    model = made(name)
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            value = torch.randn(parameter.shape, generator=generator)
            if key.endswith("lambda1") or (parameter.ndim == 1 and "norm" in key and key.endswith("weight")):
                parameter.copy_(1 + 0.3 * value)  # no norm or LayerScale may be left out unseen
            elif parameter.ndim == 2 and "position" not in key:
                parameter.copy_(value * 1.5 * parameter.shape[1] ** -0.5)
            else:
                parameter.copy_(0.3 * value)
    return model


def build(name: str) -> Any:
    return copy.deepcopy(_built(name))


def images(count: int = 3, height: int = 80, width: int = 80) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def plans(name: str) -> list[sait.Plan]:
    Stage, Plan = sait.Stage, sait.Plan
    score = "column" if name.startswith("siglip") else "cls"
    return [
        Plan([Stage(1, 0.45)], score),
        Plan([Stage(0, 9), Stage(2, 0.6)], "column"),
        Plan([Stage(0, mass=0.7), Stage(2, 0.5)], score),
        Plan([Stage(1, mass=0.6)], score),
        Plan([Stage(0, mass=0.76, max_keep=13, static=True), Stage(2, 0.6)], score),
    ]


def tokens_of(model: Any) -> int:
    return family_of(type(model)).num_prefix(model) + 25


def tensors(output: Any) -> dict[str, Tensor]:
    return {key: value for key, value in output.items() if isinstance(value, Tensor)}


Kept = list[list[list[int]]]


def oracle(
    model: Any, x: Tensor, plan: sait.Plan, kept: Kept | None = None, **arguments: Any
) -> tuple[dict[str, Tensor], Kept]:
    """The model itself, image by image. Hooks behind its blocks leave out what is dropped, and its own attention matrix
    chooses; before its blocks they leave out the rotary table's rows."""
    if kept is None:
        _, kept = _run(model, x, plan, None, **arguments)
    return _run(model, x, plan, kept, **arguments)


def _run(model: Any, x: Tensor, plan: sait.Plan, kept: Kept | None, **arguments: Any) -> tuple[dict[str, Tensor], Kept]:
    family: Any = family_of(type(model))
    prefix, blocks = family.num_prefix(model), family.blocks(model)
    # Eager attention returns its matrix; some of it is rounded to float32.
    model.set_attn_implementation("eager" if kept is None else "sdpa")
    chosen: Kept = [[] for _ in plan.stages]
    outputs = []
    for b in range(len(x)):
        left: list[Tensor] = []
        matrices: dict[int, Any] = {}

        def rotary(module: Any, args: Any, kwargs: Any, left: list[Tensor] = left) -> Any:
            if left and "position_embeddings" in kwargs:
                patches = left[-1][prefix:] - prefix
                kwargs["position_embeddings"] = tuple(table[patches] for table in kwargs["position_embeddings"])
            return args, kwargs

        def attend(i: int, module: Any, args: Any, output: Any, matrices: Any = matrices) -> None:
            matrices[i] = None if output[1] is None else output[1][0].detach()

        def drop(
            i: int, module: Any, args: Any, output: Tensor, b: int = b, left: list[Tensor] = left, m: Any = matrices
        ) -> Tensor:
            for s, stage in enumerate(plan.stages):
                if stage.block == i:
                    before = left[-1] if left else torch.arange(output.shape[1])
                    if kept is None:
                        scores = m[i].mean((0, 1)) if plan.score == "column" else m[i][:, 0].mean(0)
                        rows, _ = zoo._choose(scores, stage, prefix)
                    else:
                        rows = torch.tensor([before.tolist().index(token) for token in kept[s][b]])
                    output = output[:, rows]
                    left.append(before[rows])
                    chosen[s].append(left[-1].tolist())
            return output

        with contextlib.ExitStack() as hooks:
            for i, block in enumerate(blocks):
                for hook in (
                    block.register_forward_pre_hook(rotary, with_kwargs=True),
                    family.attention(block).register_forward_hook(functools.partial(attend, i)),
                    block.register_forward_hook(functools.partial(drop, i)),
                ):
                    hooks.callback(hook.remove)
            outputs.append(tensors(model(x[b : b + 1], **arguments)))
    longest = max(output.get("last_hidden_state", torch.empty(1, 0)).shape[1] for output in outputs)
    return {key: torch.cat([padded(output[key], longest) for output in outputs]) for key in outputs[0]}, chosen


def padded(x: Tensor, longest: int) -> Tensor:
    return x if x.dim() == 2 else nn.functional.pad(x, (0, 0, 0, longest - x.shape[1]))


def same_width(got: Tensor, want: Tensor) -> Tensor:
    """A static plan has more capacity than rows; the rest is zeros."""
    return got if got.dim() == 2 else padded(got, max(got.shape[1], want.shape[1]))


def same_width_at(key: str, want: Tensor, of_oracle: tuple[dict[str, Tensor], Any]) -> Tensor:
    return same_width(of_oracle[0][key], want)


@pytest.mark.parametrize("name", HF)
@torch.no_grad()
def test_dense_is_the_model_and_keeping_everything_is_as_exact(name: str) -> None:
    model, x = build(name), images()
    original, attributes = type(model), [dict(vars(part)) for part in model.modules()]
    want, exact = tensors(model(x)), tensors(copy.deepcopy(model).double()(x.double()))
    sait.set_density(sait.sparsify(model, plans(name)[0]))
    got = model(x, output_hidden_states=True)
    assert len(got.hidden_states) == 4
    for key, value in want.items():
        assert_same_bits(key, got[key], value)
    kept = tensors(sait.set_density(model, keep=1.0)(x))
    assert list(kept) == list(want)
    for key, value in kept.items():
        assert_model_as_exact_as_torch(f"keep=1.0: {key}", value, exact[key], partial(build(name), x), itemgetter(key))
    sait.sparsify(model, plans(name)[3])(x)
    assert sait.restore(model) is model
    assert type(model) is original
    for part, before in zip(model.modules(), attributes, strict=True):
        assert vars(part).keys() - {"_output_capturing_hooks_installed"} == before.keys()
    for key, value in tensors(model(x)).items():
        assert_same_bits(f"restored: {key}", value, want[key])


@pytest.mark.parametrize("name", HF)
@torch.no_grad()
def test_pruned_is_the_oracle(name: str) -> None:
    plain, x, model = build(name), images(), build(name)
    wide = copy.deepcopy(plain).double()
    for plan in plans(name):
        want, chosen = oracle(wide, x.double(), plan)
        got = sait.sparsify(model, plan)(x)
        assert type(got) is type(plain(x))
        assert zoo.kept_tokens(model, tokens_of(model)) == chosen, plan
        in_torch = partial(oracle, plain, x, plan, chosen)
        for key, value in tensors(got).items():
            of = partial(same_width_at, key, value)
            assert_model_as_exact_as_torch(f"{key}: {plan}", value, of((want, None)), in_torch, of)
        assert list(tensors(got)) == list(want)


@pytest.mark.parametrize("name", HF)
@torch.no_grad()
def test_an_image_does_not_see_its_batch(name: str) -> None:
    model, x = build(name), images()
    for plan in plans(name)[2:]:
        together = tensors(sait.sparsify(model, plan)(x))
        kept = zoo.kept_tokens(model, tokens_of(model))
        for b in range(3):
            alone = tensors(model(x[b : b + 1]))
            assert zoo.kept_tokens(model, tokens_of(model)) == [[stage[b]] for stage in kept]
            for key, value in alone.items():
                bound = 64 * torch.finfo(torch.float32).eps * value.abs().max().item()
                other = together[key][b : b + 1]
                torch.testing.assert_close(value, other[:, : value.shape[1]], rtol=0, atol=bound)


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_are_the_oracles(name: str) -> None:
    """In float64, of every parameter and of the images; of a training step with recomputed activations, too."""
    plain, x = build(name).double(), images(2).double()
    for plan in plans(name)[:3]:
        model = sait.sparsify(copy.deepcopy(plain), plan)
        if plan.ragged and name != "dinov3":  # whose positions are drawn at random in training
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
            model.train()
        leaf = x.clone().requires_grad_()
        with sk.backend("reference"):
            next(iter(tensors(model(leaf)).values())).square().sum().backward()
        kept = zoo.kept_tokens(model, tokens_of(model))
        twin, want = copy.deepcopy(plain), x.clone().requires_grad_()
        next(iter(oracle(twin, want, plan, kept)[0].values())).square().sum().backward()
        torch.testing.assert_close(leaf.grad, want.grad, rtol=1e-9, atol=1e-9)
        for (key, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert (ours.grad is None) == (theirs.grad is None), key
            if ours.grad is not None:
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", TRAINED)
@torch.no_grad()
def test_compile_export_and_copies(name: str) -> None:
    model, x = sait.sparsify(build(name), plans(name)[0]), images()
    want = tensors(model(x))

    def check(got: Any) -> None:
        for key, value in want.items():
            torch.testing.assert_close(got[key], value, rtol=0, atol=1e-4)

    torch._dynamo.reset()
    check(torch.compile(model, backend="aot_eager", fullgraph=True)(x))
    check(torch.export.export(model, (x,)).module()(x))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        sait.set_density(other, keep=0.2)
        other(x)
        sait.sparsify(other, plans(name)[0])
        for key, value in tensors(other(x)).items():
            assert_same_bits(key, value, want[key])
        sait.restore(other)(x)
    assert list(model.state_dict()) == list(build(name).state_dict())


@pytest.mark.parametrize("name", ["vit", "registers", "dinov3", "clip_classes", "siglip"])
@torch.no_grad()
def test_save_pretrained_writes_the_plain_model(name: str, tmp_path: Any) -> None:
    model, x = build(name), images()
    want = tensors(model(x))
    cls = type(model)
    sait.sparsify(model, plans(name)[0]).save_pretrained(tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"] == [cls.__name__]
    loaded = cls.from_pretrained(tmp_path / "hf").eval()
    assert type(loaded) is cls
    for key, value in tensors(loaded(x)).items():
        assert_same_bits(key, value, want[key])
    sait.save(model, tmp_path / "model.safetensors")
    other = sait.load(tmp_path / "model.safetensors")
    assert sait.density(other) == plans(name)[0]
    for key, value in tensors(other(x)).items():
        assert_same_bits(key, value, model(x)[key])


@pytest.mark.parametrize("name", ["vit", "deit", "registers", "dinov3", "clip_projection", "siglip"])
@torch.no_grad()
def test_the_grid_follows_the_images(name: str) -> None:
    plain, x = build(name), images(2, 64, 112)
    arguments = {} if name in ("registers", "dinov3") else {"interpolate_pos_encoding": True}
    model, plan = build(name), plans(name)[1]
    got = tensors(sait.sparsify(model, plan)(x, **arguments))
    mask, grid = sait.kept_mask(model)
    assert grid == (4, 7)
    assert mask.sum(1).tolist() == [6, 6]
    kept = zoo.kept_tokens(model, tokens_of(model) - 25 + 28)
    want, chosen = oracle(copy.deepcopy(plain).double(), x.double(), plan, **arguments)
    assert kept == chosen
    in_torch = partial(oracle, plain, x, plan, kept, **arguments)
    for key, value in got.items():
        assert_model_as_exact_as_torch(key, value, want[key], in_torch, partial(same_width_at, key, value))
    assert sait.macs(model, img_size=(64, 112)) > sait.macs(model, img_size=(64, 64))


def test_training_follows_the_modules() -> None:
    """Dropout and stochastic depth are drawn as the model's own modules draw them: with the same seed, the same."""
    for name, changes in (
        ("vit", {"hidden_dropout_prob": 0.3}),
        ("dinov2", {"drop_path_rate": 0.5, "hidden_dropout_prob": 0.3}),
        ("dinov3", {"drop_path_rate": 0.5}),
    ):
        model, x = made(name, **changes).train(), images()
        torch.manual_seed(0)
        want = tensors(model(x))
        sait.set_density(sait.sparsify(model, block=1, keep=0.5), keep=1.0)
        torch.manual_seed(0)
        for key, value in tensors(model(x)).items():
            torch.testing.assert_close(value, want[key], rtol=0, atol=1e-5)
        for density in ({"keep": 0.5}, {"mass": 0.5}):
            first, second = (tensors(sait.set_density(model, **density)(x)) for _ in range(2))
            assert all(value.isfinite().all() for value in first.values())
            assert not torch.equal(*(next(iter(output.values())) for output in (first, second)))


def test_the_heads_code_is_transformers() -> None:
    model, x, labels, seen = build("vit"), images(), torch.tensor([1, 2, 3]), []
    model.register_forward_hook(lambda *_: seen.append("model"))
    model.vit.register_forward_hook(lambda *_: seen.append("encoder"))
    signature = inspect.signature(model.forward)
    sait.sparsify(model, block=1, keep=0.5)
    assert inspect.signature(model.forward) == signature, "a Trainer reads it"
    output = model(pixel_values=x, labels=labels)
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits, labels))
    assert seen == ["encoder", "model"]
    loss, logits = model(x, labels, return_dict=False)
    assert_same_bits("tuple", logits, output.logits)
    assert loss == output.loss
    assert isinstance(model, transformers.ViTForImageClassification)
    inner = model.vit(x)  # is sparse itself, and the same
    assert inner.last_hidden_state.shape == (3, 1 + 13, 64)
    assert len(sait.selections(model.vit)) == len(sait.selections(model)) == 1
    with sait.record_scores(model) as scores:
        model(x)
    assert scores[0].shape == (3 * 26,)


@pytest.mark.parametrize("name", ["vit", "dinov3", "clip", "siglip_classes"])
@torch.no_grad()
def test_full_maps(name: str) -> None:
    """Of a dense model they are the encoder's last_hidden_state; other sizes are taken as they come."""
    model, x = build(name), images()
    encoder = family_of(type(model)).encoder(model)
    want = encoder(x).last_hidden_state
    maps = sait.full_maps(sait.set_density(sait.sparsify(model, plans(name)[0])), x)
    P = want.shape[1] - 25
    got = torch.cat([maps.prefix[0], maps.maps[0].flatten(2).mT], 1)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    sait.sparsify(model, plans(name)[3])
    maps = sait.full_maps(model, images(2, 64, 112), blocks=[0, 2])
    assert [tuple(part.shape) for part in maps.maps] == [(2, 64, 4, 7)] * 2
    assert maps.prefix[1].shape == (2, P, 64)


@pytest.mark.parametrize("name", HF)
@torch.no_grad()
def test_optimized_is_as_exact(name: str, calls: list[str]) -> None:
    plain, x, model = build(name), images(), build(name)
    wide = copy.deepcopy(plain).double()
    for plan in (plans(name)[0], plans(name)[3]):
        sait.optimize(sait.sparsify(model, plan))
        calls.clear()
        got = tensors(model(x))
        assert calls, "no GEMM of packed weights ran"
        want, kept = oracle(wide, x.double(), plan)
        assert zoo.kept_tokens(model, tokens_of(model)) == kept
        in_torch = partial(oracle, plain, x, plan, kept)
        for key, value in got.items():
            assert_model_as_exact_as_torch(key, value, want[key], in_torch, partial(same_width_at, key, value))
    want = tensors(plain(x))
    for key, value in tensors(sait.set_density(model)(x)).items():
        assert_same_bits(f"dense: {key}", value, want[key])


@pytest.mark.parametrize("name", HF)
@torch.no_grad()
def test_multiply_adds_are_those_that_torch_counts(name: str) -> None:
    model, x = build(name), images(2)
    model.set_attn_implementation("eager")
    for plan in (None, *plans(name)[:2]):
        sait.sparsify(model, plan or plans(name)[0])
        if plan is None:
            sait.set_density(model)
        else:
            sait.optimize(model)
        with FlopCounterMode(display=False) as counter:
            model(x)
        # The rotary embedding multiplies, too, but makes no product.
        assert counter.get_total_flops() == 4 * sait.macs(model, executed=True)


class OwnForward(transformers.ViTModel):
    def forward(self, pixel_values: Tensor, **others: Any) -> Any:
        return super().forward(pixel_values.flip(1), **others)


@contextlib.contextmanager
def refused(model: Any, message: str) -> Iterator[None]:
    before = {name: (type(module), list(vars(module))) for name, module in model.named_modules()}
    with pytest.raises((TypeError, ValueError), match=message):
        yield
    assert {name: (type(module), list(vars(module))) for name, module in model.named_modules()} == before


def test_what_cannot_be_patched_is_refused() -> None:
    config = transformers.ViTConfig(**SMALL)
    dino = transformers.Dinov2Config(**SMALL)
    cases: list[tuple[Any, str]] = [
        (OwnForward(config), "ViTModel, but OwnForward has its own"),
        (transformers.ViTForMaskedImageModeling(config), "ViTForMaskedImageModeling: it makes an image of all patches"),
        (transformers.Dinov2Backbone(dino), "Dinov2Backbone: its feature maps need all tokens"),
        (made("vit", attention_probs_dropout_prob=0.1), r"vit.layers.0: expected no dropout .* p=0.1"),
        (made("clip", attention_dropout=0.1), r"encoder.layers.0: expected no dropout .* p=0.1"),
        (made("clip", hidden_size=36, num_attention_heads=3), "head dimension that is a multiple of 8, .* got 12"),
        (transformers.BertModel(transformers.BertConfig(**SMALL)), r"got transformers\S*BertModel"),
    ]
    for path, module, message in (
        ("vit.layers.1", nn.Identity(), "vit.layers.1: expected one of ViTLayer, got Identity"),
        ("vit.layers.1.mlp", nn.Conv1d(3, 3, 3), "vit.layers.1.mlp: expected one of ViTMLP, got Conv1d"),
        ("vit.layers.2.layernorm_after", nn.BatchNorm1d(26), "vit.layers.2.layernorm_after: .* got BatchNorm1d"),
        ("vit.embeddings", nn.Identity(), "embeddings: expected one of ViTEmbeddings, got Identity"),
        ("vit", OwnForward(config), "ViTModel, but OwnForward has its own"),
    ):
        cases.append((made("vit"), message))
        cases[-1][0].set_submodule(path, module)
    changed = made("vit")
    changed.vit.layers[0].attention.forward = lambda x, *_, **__: (x, None)
    cases.append((changed, "vit.layers.0.attention: expected one of ViTAttention"))
    for model, message in cases:
        with refused(model, message):
            sait.sparsify(model, block=1, keep=0.5)
    clip = transformers.CLIPModel(transformers.CLIPConfig(vision_config=SMALL, text_config=SMALL))
    with refused(clip, "CLIPModel: it has a text model, too; call sparsify on model.vision_model"):
        sait.sparsify(clip, block=1, keep=0.5)
    sait.sparsify(clip.vision_model, block=1, keep=0.5)
    assert clip.get_image_features(images()).last_hidden_state.shape == (3, 1 + 13, 64)
    with refused(made("siglip"), 'has none. Use score="column"'):
        sait.sparsify(made("siglip"), block=1, keep=0.5)


def test_what_needs_all_tokens_is_refused() -> None:
    model, x = sait.sparsify(build("vit"), block=1, keep=0.5), images()
    mask = torch.ones(3, 25, dtype=torch.bool)
    for keep in (0.5, 1.0):
        sait.set_density(model, keep=keep)
        for call, arguments in (
            (model, {"output_hidden_states": True}),
            (model, {"output_attentions": True}),
            (model, {"attention_mask": mask}),
            (model, {"head_mask": mask}),
            (model.vit, {"bool_masked_pos": mask}),
        ):
            (name,) = arguments
            with pytest.raises(ValueError, match=rf"forward: {name}: .* sait.set_density\(model\)"):
                call(x, **arguments)
        with pytest.raises(ValueError, match="bool_masked_pos"):
            model.vit(x, mask)
    assert model(x, output_attentions=False, attention_mask=None).logits.shape == (3, 7)
    model.config.output_hidden_states = True
    with pytest.raises(ValueError, match="forward: output_hidden_states"):
        model(x)
    assert len(sait.set_density(model)(x).hidden_states) == 4


def test_an_encoder_that_was_changed_behind_the_models_back() -> None:
    model, x = sait.sparsify(build("vit"), block=1, keep=0.5), images()
    for change in (lambda: sait.sparsify(model.vit, block=0, keep=3), lambda: sait.restore(model.vit)):
        change()
        with pytest.raises(TypeError, match=r"the encoder in it is another .* on the whole model"):
            model(x)
    assert type(sait.restore(model)) is transformers.ViTForImageClassification
    assert sait.sparsify(model, block=1, keep=0.5)(x).logits.shape == (3, 7)


def test_transformers_is_imported_by_nobody_else() -> None:
    program = f"import sys; sys.path.insert(0, {str(Path(sait.__file__).parent.parent)!r}); import sait, timm\n"
    program += "sait.sparsify(timm.create_model('deit_tiny_patch16_224', depth=2), block=0, keep=0.5)\n"
    program += "assert not any(name.partition('.')[0] == 'transformers' for name in sys.modules)\n"
    done = run_python("-c", program)
    assert done.returncode == 0, done.stderr


def test_an_older_transformers_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from sait.families import hf

    monkeypatch.setattr(hf.transformers, "__version__", "4.57.1")
    with pytest.raises(ImportError, match=r"sait: expected transformers 5.18 or newer, got 4.57.1"):
        hf.check_version()


def test_a_strangers_configuration_inside_another() -> None:
    """Fields that shape no model are left out there, too: an implementation of attention may name a repository."""
    model = made("clip_classes")
    config = json.loads(model.config.to_json_string(use_diff=False))
    config["vision_config"] |= {"attn_implementation": "somebody/kernels", "dtype": "float16", "unknown": 1}
    again = hf.build("transformers.CLIPForImageClassification", config)
    assert again.config.vision_config._attn_implementation != "somebody/kernels"
    assert not hasattr(again.config.vision_config, "unknown")
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert checkpoint._counts({"vision_config": {"num_hidden_layers": 10**9}}) == [("num_hidden_layers", 10**9)]
