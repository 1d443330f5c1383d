"""The batch of crops, and the drawing of kept patches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from sait.data.photos import Preprocessing, draw_kept, fit_to_grid, patch_pixels, photo_batch, sheet, to_tensor

EXPECTED = Preprocessing((48, 64), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def test_to_tensor_crops_resizes_and_normalises() -> None:
    photo = Image.new("RGB", (100, 300), (255, 0, 102))
    tensor = to_tensor(photo, EXPECTED)
    assert tensor.shape == (3, 48, 64)
    expected = torch.tensor([(1.0 - 0.5) / 0.2, (0.0 - 0.4) / 0.3, (0.4 - 0.3) / 0.4])
    torch.testing.assert_close(tensor.mean((1, 2)), expected)


def test_photo_batch_is_the_same_at_every_call_and_all_different() -> None:
    batch = photo_batch(6, EXPECTED)
    assert batch.shape == (6, 3, 48, 64)
    assert torch.equal(batch, photo_batch(6, EXPECTED))
    assert torch.equal(batch[:2], photo_batch(2, EXPECTED))
    assert len({image.sum().item() for image in batch}) == 6


def test_draw_kept_leaves_kept_patches_and_greys_the_others() -> None:
    chance = np.random.default_rng(0)
    photo = Image.fromarray(chance.integers(0, 256, (96, 144, 3), dtype=np.uint8))
    kept = torch.tensor(chance.random((4, 6)) < 0.5)
    original, drawn = (np.array(picture) for picture in (fit_to_grid(photo, (4, 6)), draw_kept(photo, kept)))
    side = patch_pixels(6)
    assert drawn.shape == (4 * side, 6 * side, 3)
    for (row, column), stays in np.ndenumerate(kept.numpy()):
        # Inside of the outline, which takes two pixels of a patch.
        inside = np.s_[
            row * side + 2 : (row + 1) * side - 2,
            column * side + 2 : (column + 1) * side - 2,
        ]
        assert np.array_equal(drawn[inside], original[inside]) == bool(stays)
        assert (drawn[inside].max(-1) == drawn[inside].min(-1)).all() == (not stays)  # grey: all channels equal


@pytest.mark.parametrize("kept", [torch.ones(3, 5, dtype=torch.bool), torch.zeros(3, 5, dtype=torch.bool)])
def test_draw_kept_all_or_nothing(kept: torch.Tensor) -> None:
    drawn = draw_kept(Image.new("RGB", (50, 30), "blue"), kept)
    assert drawn.size == (5 * patch_pixels(5), 3 * patch_pixels(5))


def test_a_sheet_has_room_for_panels_and_title() -> None:
    panel = Image.new("RGB", (100, 80), "blue")
    assert sheet([[("a", panel)] * 4], "title").width >= 400
    assert sheet([[("a", panel)]], "a title that is wider than the only panel").width > 300
    two_rows = np.array(sheet([[("a", panel)], [("b", panel), ("c", panel)]], "title"))
    assert (two_rows == (0, 0, 255)).all(-1).sum() == 3 * 100 * 80
