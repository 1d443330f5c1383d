"""Replaced patches: which ones, from where, and the loss of every row that is left, against plain loops."""

from __future__ import annotations

import itertools
import math

import pytest
import sait
import small
import torch
from sait.train.replaced import replace_patches, replaced_loss

import sait_kernels as sk


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("size", "share"), [(8, 0.15), ((4, 16), 0.5), (16, 0.01)])
def test_patches_come_from_the_same_place_of_another_image(size: int | tuple[int, int], share: float) -> None:
    height, width = (size, size) if isinstance(size, int) else size
    before = torch.rand(5, 3, 32, 48, generator=seeded())
    kept = before.clone()
    images, replaced = replace_patches(before, size, share, generator=seeded(1))
    assert torch.equal(before, kept)
    columns, patches = 48 // width, (32 // height) * (48 // width)
    assert replaced.shape == (5, patches)
    assert replaced.sum(1).tolist() == [max(1, round(share * patches))] * 5
    sources = set()
    for b in range(5):
        for p in range(patches):
            top, left = p // columns * height, p % columns * width
            place = (slice(None), slice(top, top + height), slice(left, left + width))
            same = [other for other in range(5) if torch.equal(images[b][place], before[other][place])]
            assert len(same) == 1
            assert (same[0] != b) == bool(replaced[b, p])
            sources |= {(b, same[0])} if replaced[b, p] else set()
    assert share < 0.1 or len(sources) > 5  # of several images


def test_a_generator_decides_and_dtypes_stay() -> None:
    images = torch.rand(4, 3, 32, 32, generator=seeded()).bfloat16()
    one, same, other = (replace_patches(images, 8, generator=seeded(seed)) for seed in (3, 3, 4))
    assert one.images.dtype == torch.bfloat16
    assert torch.equal(one.images, same.images)
    assert torch.equal(one.replaced, same.replaced)
    assert not torch.equal(one.replaced, other.replaced)
    patches = [replace_patches(images, 8, generator=generator).replaced for generator in [seeded(5)] * 400]
    shares = torch.stack(patches).float().mean((0, 1))
    assert shares.min() > 0.06  # 2 of 16 on average 0.125, at every place
    assert shares.max() < 0.2


@pytest.mark.parametrize(
    ("images", "arguments", "named"),
    [
        (torch.zeros(1, 3, 32, 32), (8,), r"images: .* got \(1, 3, 32, 32\)"),
        (torch.zeros(3, 32, 32), (8,), "images: .* other images of the batch"),
        (torch.zeros(2, 3, 32, 32), (7,), "patch_size: expected one that divides 32 x 32 pixels, got 7 x 7"),
        (torch.zeros(2, 3, 32, 32), (0,), "patch_size"),
        (torch.zeros(2, 3, 32, 32), (8, 1.0), "share: expected a number between 0 and 1, got 1.0"),
    ],
)
def test_bad_arguments(images: torch.Tensor, arguments: tuple[float, ...], named: str) -> None:
    with pytest.raises(ValueError, match=f"replace_patches: {named}"):
        replace_patches(images, *arguments)


def entropy(logit: float, replaced: bool) -> float:
    return math.log1p(math.exp(-logit if replaced else logit))


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_the_loss_of_rows_that_are_left(prefix: int) -> None:
    replaced = torch.rand(3, 6, generator=seeded()) < 0.4
    tokens = prefix + 6
    patches = [[0, 1, 5], [2], [0, 1, 2, 3, 4, 5]]  # of images that keep different numbers
    rows = [[b * tokens + t for t in (*range(prefix), *(prefix + p for p in kept))] for b, kept in enumerate(patches)]
    bounds = torch.tensor([0, *(len(of_image) for of_image in rows)]).cumsum(0).int()
    indices = torch.tensor([*itertools.chain(*rows), 3 * tokens, 3 * tokens]).int()  # and two of no image
    logits = torch.randn(len(indices), generator=seeded(1), requires_grad=True)
    loss = replaced_loss(logits, replaced, sk.Selection(indices, bounds, tokens), num_prefix=prefix)
    terms, counts, row = [], [], 0
    for b, kept in enumerate(patches):
        counts += [False] * prefix + [True] * len(kept)
        row += prefix
        for p in kept:
            terms.append(entropy(logits[row].item(), bool(replaced[b, p])))
            row += 1
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)
    loss.backward()
    assert logits.grad is not None
    assert ((logits.grad != 0) == torch.tensor([*counts, False, False])).all()


def test_the_loss_of_all_rows() -> None:
    replaced = torch.rand(2, 4, generator=seeded()) < 0.5
    logits = torch.randn(2, 5, 1, generator=seeded(1)).bfloat16()
    loss = replaced_loss(logits, replaced, num_prefix=1)
    terms = [entropy(logits[b, 1 + p].item(), bool(replaced[b, p])) for b in range(2) for p in range(4)]
    assert loss.item() == pytest.approx(sum(terms) / 8, rel=1e-5)
    with pytest.raises(ValueError, match=r"logits: expected 10, one for each row .* got \(2, 4\)"):
        replaced_loss(logits[:, 1:, 0], replaced, num_prefix=1)
    nobody = sk.Selection(torch.tensor([0, 5]).int(), torch.tensor([0, 1, 2]).int(), 1)
    assert replaced_loss(torch.zeros(2), replaced, nobody, num_prefix=1).item() == 0


@pytest.mark.parametrize("keep", [0.5, None])
def test_a_model_learns_which_patches_are_strange(keep: float | None) -> None:
    """Images of one grey each: a replaced patch is another grey than the rest of its image."""
    model = small.build()
    if keep is None:
        sait.set_density(model)
    else:
        sait.sparsify(model, sait.methods.random(keep=keep))
    head = torch.nn.Linear(model.embed_dim, 1)
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], lr=2e-3)
    chance, losses = seeded(2), []
    torch.manual_seed(0)
    for _ in range(60):
        greys = torch.randn(16, 1, 1, 1, generator=chance).expand(-1, 3, 32, 32)
        images, replaced = replace_patches(greys, 8, generator=chance)
        logits = head(model.forward_features(images))
        kept = sait.selections(model)
        loss = replaced_loss(logits, replaced, kept[-1] if kept else None, num_prefix=1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert head.weight.grad is not None
    assert all(p.grad is not None for name, p in model.named_parameters() if not name.startswith("head"))
    share = 2 / 16
    by_share = -share * math.log(share) - (1 - share) * math.log(1 - share)  # of who knows the share and no more
    assert sum(losses[-10:]) / 10 < by_share - 0.05
