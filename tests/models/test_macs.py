"""macs agrees with torch's own counter, and with arithmetic by hand."""

from __future__ import annotations

import pytest
import sait
import timm
import torch
import zoo
from sait import Plan, Stage
from tiers import full_only
from torch.utils.flop_counter import FlopCounterMode


def counted(model, x) -> int:
    """Multiply-accumulates of each op as torch counts them, of ours by the formulas of sait_kernels.flops.

    torch has none for its fused attention on a CPU, so that is switched off here.
    """
    for module in model.requires_grad_(False).modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    with FlopCounterMode(display=False) as counter:
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


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", zoo.ZOO)
def test_torch_counts_what_is_executed(name, grad):
    """Every plan, by oneDNN's GEMMs (without gradients) and torch's; images keep different numbers."""
    model, x = zoo.build(name), zoo.images(name, count=2)
    size = tuple(x.shape[-2:])
    for plan in zoo.plans(name):
        with torch.set_grad_enabled(grad):
            assert counted(sait.sparsify(model, plan), x) == pytest.approx(
                2 * sait.macs(model, img_size=size, executed=True),
                abs=2,  # of a mean over two images, rounded
            )


@full_only(lambda name, ops: ops == "triton" and name != "registers")  # counts are of shapes: one model is enough
@pytest.mark.parametrize("name", ["vit", "distilled", "registers", "layerscale_qknorm", "siglip"])
@torch.no_grad()
def test_torch_counts_what_an_optimized_model_executes(name, ops, calls):
    """Its last block leaves what the head reads, and that is less than the method has."""
    model, x = zoo.build(name), zoo.images(name, count=2)
    for plan in zoo.plans(name):
        sait.optimize(sait.sparsify(model, plan))
        executed = counted(model, x)
        assert executed == pytest.approx(2 * sait.macs(model, executed=True), abs=2)
        last_drops = plan.stages[-1].block == 3
        if name != "siglip" and not last_drops:
            assert executed < 2 * sait.macs(model)
        sait.deoptimize(model)
    assert calls


@torch.no_grad()
def test_dense_executes_all_rows_though_it_is_optimized() -> None:
    """It is the model's own forward; a SaitViT has one forward, and its last block leaves what the head reads."""
    model, x = zoo.build("vit"), zoo.images("vit", count=2)
    sait.set_density(sait.optimize(sait.sparsify(model, block=1, keep=0.45)))
    assert counted(model, x) == 2 * sait.macs(model, executed=True) == 2 * sait.macs(model)
    vit = sait.optimize(sait.SaitViT(64, block=1, embed_dim=64, num_heads=2, depth=3, num_classes=5).eval())
    sait.set_density(vit)
    assert counted(vit, torch.randn(2, 3, 64, 64)) == 2 * sait.macs(vit, executed=True) < 2 * sait.macs(vit)


@pytest.mark.parametrize("name", ["gated", "rms_norm"])
@torch.no_grad()
def test_optimized_blocks_that_run_their_modules_execute_all_rows(name):
    model, x = zoo.build(name), zoo.images(name, count=2)
    sait.optimize(sait.sparsify(model, block=1, keep=0.45))
    assert counted(model, x) == 2 * sait.macs(model, executed=True) == 2 * sait.macs(model)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_pruned_is_what_remains_of_each_block(name):
    """By hand, from the tokens that a forward left."""
    model, x = zoo.build(name), zoo.images(name, count=1)
    n = first = zoo.tokens_of(model, x)
    size = tuple(x.shape[-2:])
    dense, each = sait.macs(model, img_size=size), []
    for block in model.blocks:
        linears = [m for m in block.modules() if isinstance(m, torch.nn.Linear)]
        rest = sum(linear.weight.numel() for linear in linears) - block.attn.qkv.weight.numel()
        each.append((block.attn.qkv.weight.numel(), rest, block.attn.attn_dim))
    around = dense - sum(n * (qkv + rest) + 2 * n * n * width for qkv, rest, width in each)
    assert around > 0
    for plan in zoo.plans(name):
        if name in ("siglip", "prr") or (plan.static and plan.ragged):
            continue  # attention pooling sees fewer, and tails are rows of the linear layers: torch counts them above
        model.eval()
        with torch.no_grad():
            sait.sparsify(model, plan)(x)
        kept = [int(selection.cu_seqlens[-1]) for selection in sait.selections(model)]
        want, n = around, first
        for i, (qkv, rest, width) in enumerate(each):
            m = n
            for stage, left in zip(plan.stages, kept, strict=True):
                if stage.block == i:
                    m = left
                    if stage.keep != 1.0:
                        want += width * n * (n if plan.score == "column" else 1)
            want += n * qkv + m * rest + 2 * m * n * width
            n = m
        assert sait.macs(model, img_size=size) == want
        assert sait.macs(sait.restore(model), plan, img_size=size, kept=kept) == want


def test_training_counts_the_gradients_of_ours():
    """The backward pass of linear layers takes two GEMMs for each one of the forward pass, that of attention five for
    two."""
    model, x = zoo.build("vit"), zoo.images("vit", count=1)
    sait.sparsify(model, block=1, keep=0.45)
    n, m, width = 26, 13, 64
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    forward = 2 * sait.macs(model, executed=True)
    of_attention = 2 * width * (n * n + m * n + 2 * m * m)
    of_scores, of_patches = 2 * n * width, 2 * 25 * 768 * 64  # images need no gradient
    linear = forward - 2 * of_attention - of_scores - of_patches
    assert counter.get_total_flops() == forward + 2 * linear + 5 * of_attention + of_patches


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
    sait.set_density(model, scale=0.9)
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
    with pytest.raises(TypeError, match="expected one that sparsify takes"):
        sait.macs(timm.create_model("resnet18"))
