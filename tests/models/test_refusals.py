"""What cannot be patched rightly is refused with the reason, and left as it was."""

from __future__ import annotations

import copy

import pytest
import sait
import timm
import torch
import zoo
from timm.layers import DiffAttention, GlobalResponseNormMlp, LayerNorm2d
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock, VisionTransformer
from timm.utils import ModelEmaV3
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

TINY = {"embed_dim": 64, "num_heads": 2, "depth": 2, "num_classes": 5}


class OwnForward(VisionTransformer):
    def forward(self, x):
        return super().forward(x) * 2


class OwnPositions(VisionTransformer):
    def _pos_embed(self, x):
        return super()._pos_embed(x.flip(1))


class OwnTrainingLoop(VisionTransformer):
    def loss(self, x, target):
        return nn.functional.cross_entropy(self(x), target)


def assert_refused(model, error, message, **changes):
    before = type(model), list(vars(model)), {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(error, match=message):
        sait.sparsify(model, **({"block": 1, "keep": 0.5} | changes))
    assert (type(model), list(vars(model)), {name: type(m) for name, m in model.named_modules()}) == before


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("beit_base_patch16_224", {"img_size": 64}, "Beit: its attention adds a relative position bias"),
        ("vit_relpos_small_patch16_224", {"img_size": 64}, "RelPos: its attention adds a relative position bias"),
        ("naflexvit_base_patch16_gap", {}, "NaFlexVit: it already runs on padded sequences"),
    ],
)
def test_other_transformers(name, changes, reason):
    assert_refused(timm.create_model(name, **(TINY | changes)), TypeError, reason)


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224"])
def test_models_that_are_no_vit(name):
    assert_refused(
        timm.create_model(name, num_classes=5), TypeError, "expected a .*timm VisionTransformer, .*, got timm.models"
    )


class Task(nn.Module):
    """As a trainer has them: the model two levels down, among other things."""

    def __init__(self, model):
        super().__init__()
        self.criterion, self.parts = nn.CrossEntropyLoss(), nn.ModuleDict({"student": model})


@pytest.mark.parametrize(
    ("wrap", "path"),
    [
        (nn.DataParallel, "module"),
        (ModelEmaV3, "module"),
        (lambda model: nn.Sequential(nn.Identity(), model), "1"),
        (Task, "parts.student"),
        (lambda model: torch.compile(model, backend="eager"), "_orig_mod"),
        (torch.optim.swa_utils.AveragedModel, "module"),
    ],
)
def test_wrapped_models(wrap, path):
    reason = rf"it wraps the model; call sparsify on its \.{path}, a VisionTransformer"
    assert_refused(wrap(zoo.build("vit")), TypeError, reason + ("; compile" if path == "_orig_mod" else "$|\\."))


def test_calls_on_what_wraps_a_sparse_model():
    model = nn.Sequential(nn.Identity(), sait.sparsify(zoo.build("vit"), block=1, keep=0.5))
    for call in (sait.set_density, sait.density, sait.optimize, sait.selections, sait.kept_mask, sait.explain):
        with pytest.raises(TypeError, match=rf"{call.__name__}: .* got Sequential. It wraps one: call .* on its \.1\."):
            call(model)
    with pytest.raises(TypeError, match=r"macs: .* got Sequential. It wraps the model: call macs on its \.1\."):
        sait.macs(model)


def test_wrapped_in_feature_extractors():
    net = timm.create_model("vit_tiny_patch16_224", features_only=True, img_size=64, depth=4)
    assert_refused(net, TypeError, r"call sparsify on its \.model, a VisionTransformer")


def test_no_models():
    assert_refused(nn.Linear(3, 3), TypeError, r"got torch.nn.modules.linear.Linear")
    assert_refused(sait.SaitViT(80, block=1, **TINY), TypeError, "call sait.set_density on it")


def test_changed_methods():
    assert_refused(OwnForward(80, **TINY), TypeError, "OwnForward has its own forward")
    assert_refused(OwnPositions(80, **TINY), TypeError, "OwnPositions has its own _pos_embed")
    model = zoo.build("vit")
    model.forward_head = lambda x: x
    assert_refused(model, TypeError, "VisionTransformer has its own forward_head")


def test_a_subclass_that_changes_no_forward_is_taken():
    model = sait.sparsify(OwnTrainingLoop(80, **TINY), block=1, keep=0.5)
    assert isinstance(model, OwnTrainingLoop)
    assert model.loss(torch.randn(2, 3, 80, 80), torch.tensor([1, 2])).isfinite()


@pytest.mark.parametrize(
    ("changes", "error", "reason"),
    [
        ({"block_fn": ResPostBlock}, TypeError, r"blocks.0: .* ResPostBlock: it normalises after attention"),
        ({"block_fn": ParallelScalingBlock}, TypeError, "ParallelScalingBlock: attention and MLP run side by side"),
        ({"attn_layer": DiffAttention}, TypeError, "DiffAttention: it subtracts two attention maps"),
        ({"mlp_layer": GlobalResponseNormMlp}, TypeError, "GlobalResponseNormMlp: it normalises over all tokens"),
        ({"attn_drop_rate": 0.1}, ValueError, r"no dropout of attention weights, got p=0.1. Build"),
        ({"patch_drop_rate": 0.1}, TypeError, r"patch_drop: .* PatchDropout: .* patch_drop_rate=0"),
        ({"embed_dim": 36, "num_heads": 3}, ValueError, "multiple of 8, at most 256, got 12"),
        ({"embed_dim": 264, "num_heads": 1}, ValueError, "multiple of 8, at most 256, got 264"),
    ],
)
def test_parts_that_mix_tokens_or_have_no_kernel(changes, error, reason):
    if "mlp_layer" in changes:  # takes no norm layer, so the model is made first
        model = zoo.build("vit")
        model.blocks[2].mlp = GlobalResponseNormMlp(64, 128)
    else:
        model = zoo.build("vit", **changes)
    assert_refused(model, error, reason)


def test_exchanged_parts():
    model = zoo.build("vit")
    for path, other in (
        ("blocks.1.norm2", nn.BatchNorm1d(26)),
        ("blocks.3.attn.q_norm", LayerNorm2d(32)),
        ("blocks.0.ls1", nn.Linear(64, 64)),
        ("blocks.0.drop_path2", nn.Dropout1d()),
        ("norm", nn.GroupNorm(1, 26)),
    ):
        changed = copy.deepcopy(model)
        changed.set_submodule(path, other)
        assert_refused(changed, TypeError, rf"model: {path}: .* got {type(other).__name__}")
    model.blocks[2].attn.forward = lambda x, **_: x
    assert_refused(model, TypeError, r"blocks.2.attn: .* its forward is not timm's")
    model = zoo.build("vit")
    model.blocks[2].attn.scale = 1.0
    assert_refused(model, ValueError, r"blocks.2.attn: expected scale = head_dim \*\* -0.5, got 1.0")


@pytest.mark.parametrize("score", ["cls", "cls_value"])
@pytest.mark.parametrize("name", zoo.NO_PREFIX)
def test_no_class_token_no_class_score(name, score):
    assert_refused(zoo.build(name), ValueError, 'has none. Use score="column"', score=score)


def test_mass_needs_a_pooling_that_can_be_ragged():
    prr, unpooled = zoo.build("prr"), zoo.build("vit", global_pool="")
    assert_refused(prr, ValueError, "global_pool='prr' takes no mask", keep=None, mass=0.9)
    assert_refused(unpooled, ValueError, "global_pool='' returns the tokens", keep=None, mass=0.9)
    sait.sparsify(unpooled, block=1, keep=0.5)
    assert unpooled(zoo.images("vit")).shape == (3, 14, 24)
    with pytest.raises(ValueError, match="global_pool='' returns the tokens as one tensor"):
        sait.set_density(unpooled, mass=0.5)
    model = sait.sparsify(zoo.build("vit"), block=1, mass=0.5)
    model.reset_classifier(24, global_pool="")
    with pytest.raises(ValueError, match="global_pool=''"):
        model(zoo.images("vit"))


def test_what_needs_all_tokens_names_the_cure():
    model, x = sait.sparsify(zoo.build("vit"), block=1, keep=0.5), zoo.images("vit")
    for keep in (0.5, 1.0):
        sait.set_density(model, keep=keep)
        with pytest.raises(ValueError, match=r"attn_mask and is_causal .* sait.set_density\(model\)"):
            model(x, attn_mask=torch.ones(26, 26, dtype=torch.bool))
        with pytest.raises(ValueError, match=r"attn_mask and is_causal .* sait.set_density\(model\)"):
            model.forward_features(x, is_causal=True)
        with pytest.raises(ValueError, match=r"attn_mask and is_causal .* sait.set_density\(model\)"):
            model.forward_intermediates(x, is_causal=True)


def test_torch_fx_is_told_what_there_is_instead():
    model = sait.sparsify(zoo.build("vit"), block=1, keep=0.5)
    with pytest.raises(TypeError, match=r"forward: torch.fx traces .* sait.full_maps; for a program, torch.export"):
        create_feature_extractor(model, ["blocks.3"])
    traced = create_feature_extractor(sait.set_density(model), ["blocks.3"])
    assert traced(zoo.images("vit"))["blocks.3"].shape == (3, 26, 64)


def test_padded_features_are_not_pooled():
    model, x = sait.sparsify(zoo.build("avgmax"), block=1, mass=0.5), zoo.images("avgmax")
    with pytest.raises(ValueError, match="forward_head: with mass, features of images are padded"):
        model.forward_head(model.forward_features(x))


def test_more_patches_than_there_are():
    model = sait.sparsify(zoo.build("vit"), block=1, keep=26)
    with pytest.raises(ValueError, match=r"keep: .* 25"):
        model(zoo.images("vit"))
