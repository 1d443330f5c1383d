"""Images of which cumulative score keeps numbers that were drawn."""

from __future__ import annotations

import copy

import pytest
import sait
import spread
import torch
from sait.bench.plain import PlainPruning, heads, share
from tiny import images, small_vit


def test_numbers_have_the_range_and_the_mean_that_were_measured() -> None:
    numbers = spread.drawn(256, 1000)
    assert 146 <= min(numbers) < 149
    assert 176 < max(numbers) <= 179
    assert sum(numbers) / 1000 == pytest.approx(164, abs=0.1)


@pytest.mark.parametrize("seed", range(5))
def test_few_images_have_the_spread_too(seed: int) -> None:
    numbers = spread.drawn(256, 16, seed)
    assert numbers == spread.drawn(256, 16, seed)
    assert numbers != spread.drawn(256, 16, seed + 1)
    assert list(numbers) != sorted(numbers)
    assert sum(numbers) / 16 == pytest.approx(164, abs=1)
    assert min(numbers) < 155
    assert max(numbers) > 173


def test_numbers_are_shares_of_the_patches_there_are() -> None:
    assert max(abs(few - many / 2) for few, many in zip(spread.drawn(128, 16), spread.drawn(256, 16), strict=True)) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ours_keeps_these_numbers_by_its_own_rule(dtype: torch.dtype) -> None:
    """The whole model, optimized and not, and in the dtype that it runs in."""
    vit = small_vit().to(dtype)
    before = copy.deepcopy(vit.state_dict())
    uneven, counts = spread.uneven(vit, images(6).to(dtype), 1, 0.9)
    assert (uneven.shape, uneven.dtype) == (images(6).shape, dtype)
    assert counts == spread.drawn(25, 6)
    assert len(set(counts)) > 1
    with torch.inference_mode():
        for prepare, off in ((sait.optimize, 0), (lambda model: model, 0 if dtype == torch.float32 else 1)):
            ours = prepare(sait.sparsify(share(vit), block=1, mass=0.9))
            ours(uneven)
            kept = sait.selections(ours)[0].cu_seqlens.diff() - 1
            assert (kept - torch.tensor(counts)).abs().max() <= off
    changed = {name for name, tensor in vit.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"blocks.1.attn.qkv.weight"}  # and the bias, which is 0
    assert torch.equal(vit.blocks[1].attn.qkv.weight[64:], before["blocks.1.attn.qkv.weight"][64:])


@pytest.mark.parametrize("name", ["vit_small_patch16_224", "vit_small_patch16_dinov3", "eva02_small_patch14_224"])
@torch.no_grad()
def test_scaling_queries_scales_logits_of_attention(name: str) -> None:
    """Of projections side by side, of one whose biases are apart, and of three projections."""
    vit = small_vit(name, img_size=80 if "14" not in name else 84)
    block = vit.blocks[1]
    for tensor in (*block.attn.parameters(), *block.attn.buffers()):
        torch.nn.init.normal_(tensor)
    plain = PlainPruning(vit, 1, 0.5)
    normed = torch.randn(2, 7, 64, dtype=torch.double)
    q, k, v = heads(plain.view(block), normed)
    spread.scale_queries(vit, 1, 4.0)
    torch.testing.assert_close(heads(plain.view(block), normed), (4 * q, k, v))


def test_queries_with_a_norm_are_refused() -> None:
    with pytest.raises(ValueError, match="norm"):
        spread.scale_queries(small_vit(qk_norm=True), 1, 2.0)


def test_attention_that_stays_flat_is_reported() -> None:
    vit = small_vit().float()
    with torch.no_grad():
        vit.blocks[1].attn.qkv.weight.zero_()
    with pytest.raises(RuntimeError, match="too many"):
        spread.uneven(vit, images().float(), 1, 0.9)


@torch.inference_mode()
def test_another_number_of_patches_shows_in_the_logits() -> None:
    """In float32 a single one of one image does; the images behind the checked ones are not looked at."""
    vit, batch = small_vit().float(), images(5).float()
    check, plain = spread.kept_check(vit, batch, 1), PlainPruning(vit, 1, 1.0)
    kept = (9, 12, 15, 20, 3)
    each = [plain(image[None], count) for image, count in zip(batch, kept, strict=True)]
    check(torch.cat(each), kept)
    check(torch.cat([*each[:4], each[0]]), kept)
    with pytest.raises(RuntimeError, match="off by"):
        check(torch.cat([*each[:3], plain(batch[3:4], 21), each[4]]), kept)
