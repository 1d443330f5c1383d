"""Canvas: splits that share nothing, images that a seed and an index decide, and the picture that is meant."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sait.data import Canvas
from sait.data.canvas import SPLITS, _digits, _photos
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader


def test_images_are_what_the_model_wants():
    images, labels = Canvas("train", 64, 0).batch(range(64))
    assert images.shape == (64, 3, 64, 64)
    assert images.dtype == torch.float32
    assert images.isfinite().all()
    assert -1 <= images.min() < images.max() <= 1
    assert labels.dtype == torch.int64
    assert set(labels.tolist()) == set(range(10))
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    other, _ = Canvas("train", 64, 0, mean=mean, std=std).batch(range(64))
    pixels = other * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    torch.testing.assert_close(pixels, images * 0.5 + 0.5)


def test_an_image_depends_on_seed_and_index_alone():
    canvas = Canvas("train", 50, 3)
    images, labels = canvas.batch(range(50))
    for other in (Canvas("train", 50, 3), Canvas("train", 1000, 3)):
        assert torch.equal(other.batch(range(50))[0], images)
    for i in (0, 7, 49):
        image, label = canvas[i]
        torch.testing.assert_close(image, images[i], rtol=0, atol=1e-6)
        assert label == labels[i]
    assert not torch.equal(Canvas("train", 50, 4).batch(range(50))[1], labels)
    assert not torch.equal(Canvas("train", 50, (3, 1)).batch(range(50))[1], labels)


def test_splits_share_neither_digit_nor_photo():
    digits = [_digits(split)[0].flatten(1) for split in SPLITS]
    assert sum(map(len, digits)) == 1797
    for one, other in itertools.combinations(digits, 2):
        assert torch.cdist(one, other).min() > 0  # no two digit images are equal
    columns = [_photos(split) for split in SPLITS]
    whole = torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2)
    assert torch.equal(torch.cat(columns, dim=3), whole)


def test_a_loader_gets_whole_batches_at_once():
    canvas = Canvas("test", 20, 0)
    images, labels = zip(*DataLoader(canvas, batch_size=8), strict=True)
    want_images, want_labels = canvas.batch(range(20))
    torch.testing.assert_close(torch.cat(images), want_images, rtol=0, atol=1e-6)
    assert torch.equal(torch.cat(labels), want_labels)


def test_shards_are_the_set():
    canvas = Canvas("test", 23, 0)
    shards = [torch.cat([labels for _, labels in canvas.batches(4, rank=rank, world_size=3)]) for rank in range(3)]
    together = torch.empty(23, dtype=torch.int64)
    for rank, shard in enumerate(shards):
        together[rank::3] = shard
    assert torch.equal(together, canvas.placements.label)


def test_the_digit_is_where_its_placement_says():
    canvas = Canvas("test", 100, 1, background=0.0, contrast=(1.0, 1.0))
    images, _ = canvas.batch(range(100))
    ink = images[:, 0] * 0.5 + 0.5
    place = canvas.placements
    assert (place.side >= 28).all()
    assert (place.side <= 44).all()
    assert (place.top + place.side <= 64).all()
    position = torch.arange(64) + 0.5
    for weights, corner in ((ink.sum(2), place.top), (ink.sum(1), place.left)):
        inside = (position >= corner[:, None] - 4) & (position <= (corner + place.side)[:, None] + 4)
        assert (weights[~inside] == 0).all()
        assert (weights[inside].view(-1) > 0).float().mean() > 0.5


def test_a_digit_is_enlarged_bilinearly():
    canvas = Canvas("test", 1, 0, img_size=32, digit_side=(1.0, 1.0), contrast=(1.0, 1.0), background=0.0)
    ink = canvas[0][0][0] * 0.5 + 0.5
    digit = _digits("test")[0][canvas.placements.digit]
    want = F.interpolate(digit[None], size=32, mode="bilinear")[0, 0]
    torch.testing.assert_close(ink[2:-2, 2:-2], want[2:-2, 2:-2], rtol=0, atol=1e-6)  # the edge fades out instead


def test_ink_covers_the_dimmed_photo():
    plain, inked = (Canvas("test", 20, 0, contrast=(c, c)).batch(range(20))[0] for c in (1e-6, 0.5))
    assert plain.max() <= 2 * 0.2 - 1 + 1e-5  # nothing but the photo, dimmed to 0.2
    assert (inked >= plain - 1e-5).all()
    assert inked.amax((1, 2, 3)).min() > plain.max() - 0.5


def test_masks_change_no_picture_and_depend_on_seed_and_index_alone():
    canvas = Canvas("train", 40, (5, 1))
    images, labels, masks = canvas.batch_with_masks(range(40))
    want_images, want_labels = canvas.batch(range(40))
    assert torch.equal(images, want_images)
    assert torch.equal(labels, want_labels)
    assert masks.dtype == torch.bool
    assert masks.shape == (40, 64, 64)
    again = Canvas("train", 400, (5, 1), background=0.7, contrast=(0.1, 0.2)).batch_with_masks([3, 39])[2]
    assert torch.equal(again, masks[[3, 39]])  # of the digit's place alone
    assert not torch.equal(Canvas("train", 40, (5, 2)).batch_with_masks(range(40))[2], masks)


def test_a_mask_is_where_the_digit_is():
    canvas = Canvas("test", 200, 1, background=0.0, contrast=(1.0, 1.0))
    images, _, masks = canvas.batch_with_masks(range(200))
    ink = images[:, 0] * 0.5 + 0.5  # nothing but the digit, at full contrast
    sure = (ink - 0.5).abs() > 1e-5
    assert torch.equal(masks[sure], ink[sure] > 0.5)
    place = canvas.placements
    for i in range(200):
        rows, columns = masks[i].nonzero().unbind(1)
        for at, corner in ((rows, place.top[i]), (columns, place.left[i])):
            assert corner - 1 <= at.min() < at.max() + 1 <= corner + place.side[i] + 1
    shares = masks.float().mean((1, 2)) / (place.side / 64) ** 2
    assert shares.min() > 0.1  # no empty masks, none that is the whole square
    assert shares.max() < 0.7


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"split": "val"}, "split"),
        ({"size": 0}, "size"),
        ({"img_size": 224}, "img_size"),
        ({"digit_side": (0.5, 1.5)}, "digit_side"),
        ({"contrast": (0.9, 0.1)}, "contrast"),
        ({"background": 2.0}, "background"),
    ],
)
def test_bad_arguments(arguments, named):
    with pytest.raises(ValueError, match=f"Canvas: {named}: expected"):
        Canvas(**{"split": "train", **arguments})


def test_indices_outside_the_set():
    with pytest.raises(IndexError, match="5 images"):
        Canvas("train", 5)[5]
    assert len(list(Canvas("train", 5))) == 5
