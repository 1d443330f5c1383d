"""macs agrees with torch's own counter, and with arithmetic by hand."""

from __future__ import annotations

import pytest
import sait
import timm
import torch
import zoo
from sait import Plan, Stage
from torch.utils.flop_counter import FlopCounterMode


def counted(model, x) -> int:
    """Multiply-accumulates that torch sees: not those in the ops of sait_kernels, nor in its own fused ones.

    Fused attention is switched off here, fused linear layers do not run where gradients are enabled.
    """
    for module in model.requires_grad_(False).modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    with FlopCounterMode(display=False) as counter, torch.enable_grad():
        model(x)
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", zoo.ZOO)
def test_dense_is_what_torch_counts(name):
    model, x = zoo.build(name), zoo.images(name, count=1)
    size = tuple(x.shape[-2:])
    assert sait.macs(model, img_size=size) == counted(model, x)
    sait.sparsify(model, zoo.plans(name)[0])
    assert sait.macs(sait.set_density(model, keep=1.0), img_size=size) == counted(sait.set_density(model), x)
    assert sait.macs(sait.set_density(model), img_size=size) == counted(model, x)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_pruned_is_linear_layers_plus_attention(name):
    model, x = zoo.build(name), zoo.images(name, count=1)
    n = first = zoo.tokens_of(model, x)
    for plan in zoo.plans(name):
        if name == "siglip" and plan.ragged:
            continue  # its attention pooling runs on padded tokens, which are no work of the method's
        linear = counted(sait.sparsify(model, plan), x)
        kept = [int(selection.cu_seqlens[-1]) for selection in sait.selections(model)]
        attention, n = 0, first
        for i, block in enumerate(model.blocks):
            m = n
            for stage, left in zip(plan.stages, kept, strict=True):
                if stage.block == i:
                    m = left
                    if stage.keep != 1.0:
                        attention += block.attn.attn_dim * n * (n if plan.score == "column" else 1)
            attention += 2 * m * n * block.attn.attn_dim
            n = m
        size = tuple(x.shape[-2:])
        assert sait.macs(model, img_size=size) == linear + attention
        assert sait.macs(sait.restore(model), plan, img_size=size, kept=kept) == linear + attention


def test_mass_is_the_mean_over_images():
    model, x = zoo.build("vit"), zoo.images("vit")
    plan = Plan([Stage(1, mass=0.6), Stage(2, mass=0.8)])
    sait.sparsify(model, plan)
    with pytest.raises(ValueError, match=r"with mass the images decide\. Run the model at this plan first"):
        sait.macs(model)
    with torch.no_grad():
        model(x)
    counts = [[len(image) for image in stage] for stage in zoo.kept_tokens(model, 26)]
    assert len(set(counts[0])) > 1
    each = [sait.macs(model, plan, kept=image) for image in zip(*counts, strict=True)]
    assert sait.macs(model) == round(sum(each) / 3)
    sait.set_density(model, mass=0.5)
    with pytest.raises(ValueError, match="with mass the images decide"):
        sait.macs(model, plan, img_size=96)


def test_deit_small():
    model = timm.create_model("deit_small_patch16_224")
    headline = Plan([Stage(3, keep=0.45)])
    assert round(sait.macs(model) / 1e9, 2) == 4.60
    assert round(sait.macs(model, headline) / 1e9, 2) == 2.74
    assert sait.macs(timm.create_model("sait_deit_small_patch16_224")) == sait.macs(model, headline)


def test_refusals():
    model = zoo.build("vit")
    with pytest.raises(ValueError, match=r"kept: expected 1 counts, one per stage, in \(0, 26\], got \[14, 9\]"):
        sait.macs(model, Plan([Stage(1, keep=0.5)]), kept=[14, 9])
    with pytest.raises(ValueError, match=r"in \(0, 26\], got \[27\]"):
        sait.macs(model, Plan([Stage(1, keep=0.5)]), kept=[27])
    with pytest.raises(ValueError, match="expected at most 3"):
        sait.macs(model, Plan([Stage(4, keep=0.5)]))
    with pytest.raises(TypeError, match="expected a timm VisionTransformer"):
        sait.macs(timm.create_model("resnet18"))
