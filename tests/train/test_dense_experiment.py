"""make dense: the whole chain on the smallest size, its overlaps, and models of the same size."""

from __future__ import annotations

import json
from pathlib import Path

import intervals
import numpy as np
import pytest
import recorded
import runner
import sait
import torch
import torch.nn.functional as F
from dense import __main__ as command
from dense import models, report, segmentation
from dense.settings import BLOCK, CHANNELS, CLASSES, CONV, DENSITIES, FULL, HYBRIDS, PLANS, QUICK, VARIANTS
from recorded import Run
from sait.data import Canvas
from tiers import full_only


def test_from_runs_to_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "results.json", tmp_path / "docs"
    words = ["--quick", "--results", str(path), "--out", str(out)]
    command.main([*words, "--only", "speed"])
    assert "Not run yet" in (out / "dense.md").read_text()
    command.main(words)
    document = json.loads(path.read_text())
    assert recorded.done(document) == set(command.runs(QUICK))
    rows = recorded.read(path)["rows"]
    for variant in VARIANTS:
        found = [row for row in rows if row["variant"] == variant]
        wanted = {"dense"} if variant == CONV else {*DENSITIES, HYBRIDS[variant]}
        assert {row["density"] for row in found} == wanted
        for row in found:
            of_images = intervals.unpack_shares(row["iou_of_images"])
            assert len(of_images) == row["images"] == QUICK.test_images
            assert of_images.mean() == pytest.approx(row["iou"], abs=2e-5)
            assert (row["ink_kept"] == 1) == (row["density"] == "dense")
    text = (out / "dense.md").read_text()
    assert "Not run yet" not in text
    for wanted in (*VARIANTS, "not below -1.0", "fewer multiply-adds", "training, img/s", "What was predicted"):
        assert wanted in text

    before = path.read_bytes()
    capsys.readouterr()
    command.main(words)  # all is done
    assert capsys.readouterr().out == ""
    assert path.read_bytes() == before
    command.main([*words, "--list", "--only", "segmentation/hybrid"])
    assert capsys.readouterr().out == "done  segmentation/hybrid/0\n"
    with pytest.raises(SystemExit):
        command.main([*words, "--only", "segmentation/nothing"])
    assert "no run of that name" in capsys.readouterr().err


@full_only(lambda: True)  # starts another Python
def test_runs_in_processes_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    words = ["--quick", "--results", str(path), "--no-report", "--jobs", "2", "--only", "segmentation/conv only"]
    command.main(words)
    assert recorded.done(recorded.read(path)) == {Run("segmentation", CONV, 0)}


def test_the_report_is_of_the_results() -> None:
    document = recorded.read(runner.ROOT / "experiments" / "dense" / "results.json")
    assert (runner.ROOT / "docs" / "dense.md").read_text(encoding="utf-8") == report.markdown(document)


def test_a_report_without_runs_says_so() -> None:
    assert "Not run yet: `make dense`." in report.markdown({"rows": []})


def test_runs_are_chosen_by_name() -> None:
    runs = list(command.runs(FULL))
    assert len(runs) == len(set(runs)) == FULL.seeds * len(VARIANTS) + 1
    chosen = [run.name for run in runs if runner.matches(run, "segmentation/hybrid")]
    assert chosen == [f"segmentation/hybrid/{seed}" for seed in range(FULL.seeds)]  # and none that drops


@pytest.mark.parametrize("size", [FULL, QUICK])
def test_models_are_of_one_size(size) -> None:
    counts = {variant: models.parameters(models.Segmenter(variant, size.depth)) for variant in VARIANTS}
    hybrid = models.check_alike(size.depth)
    for variant in VARIANTS:
        assert abs(counts[variant] / hybrid - 1) <= models.ALIKE
        assert variant == CONV or counts[variant] == hybrid
    with pytest.raises(ValueError, match="within 5%"):
        models.check_alike(4)


def test_multiply_adds_of_what_is_dropped() -> None:
    model = models.Segmenter("hybrid", 3).eval()
    whole = models.cost(model)
    model.encoder.set_plan(PLANS["keep 0.45"])
    n, kept, C = 64, 29, CHANNELS
    # The stage's block: queries, and all behind attention, of those that stay; and the columns' score of all pairs.
    stage = 2 * (n - kept) * n * C + (n - kept) * 9 * C * C - n * n * C
    later = (n - kept) * 12 * C * C + 2 * (n * n - kept * kept) * C
    assert BLOCK == 1
    assert whole - models.cost(model) == stage + later
    model.encoder.set_plan(None)
    assert models.cost(model) == whole


def test_overlap_counts_what_is_named_rightly() -> None:
    rng = np.random.default_rng(0)
    found = torch.from_numpy(rng.integers(0, 3, (20, 6, 6)))
    masks, labels = torch.from_numpy(rng.random((20, 6, 6)) < 0.4), torch.from_numpy(rng.integers(0, 2, 20))
    got = segmentation.overlaps(found, labels, masks)
    for i in range(20):
        digit = {p for p in np.ndindex(6, 6) if masks[i][p]}
        named = {p for p in np.ndindex(6, 6) if found[i][p] == labels[i] + 1}
        taken = {p for p in np.ndindex(6, 6) if found[i][p] > 0}
        assert got[i] == pytest.approx(len(named & digit) / len(taken | digit))
    exact = (labels.view(-1, 1, 1) + 1) * masks
    assert (segmentation.overlaps(exact, labels, masks) == 1).all()
    assert (segmentation.overlaps((exact + 1) * masks, labels, masks) == 0).all()  # found, but the wrong digit
    assert segmentation.overlaps(exact[:1] * 0, labels[:1], masks[:1] & False).tolist() == [0]


def test_overlap_over_classes() -> None:
    confusion = torch.zeros(CLASSES, CLASSES, dtype=torch.int64)
    confusion[0, 0], confusion[0, 3], confusion[3, 3], confusion[3, 0] = 90, 4, 5, 1
    assert segmentation.class_overlap(confusion) == pytest.approx((90 / 95 + 5 / 10) / 2)


def test_the_loss_is_the_one_that_is_told() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, CLASSES, 8, 8, requires_grad=True)
    labels, masks = torch.tensor([2, 9, 0]), torch.rand(3, 8, 8) < 0.3
    loss = segmentation.loss_of(logits, labels, masks)
    want = 0.0
    for image, label, mask in zip(logits.detach().double(), labels.tolist(), masks, strict=True):
        shares = image.exp() / image.exp().sum(0)
        right = torch.where(mask, shares[label + 1], shares[0])
        both, sums = shares[label + 1][mask].sum(), (1 - shares[0]).sum() + mask.sum()
        want += float(-right.log().mean() + 1 - (2 * both + 1) / (sums + 1)) / 3
    assert loss.item() == pytest.approx(want, rel=1e-5)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.abs().min() > 0
    sure = F.one_hot((labels.view(-1, 1, 1) + 1) * masks, CLASSES).permute(0, 3, 1, 2) * 50.0
    assert segmentation.loss_of(sure, labels, masks).item() == pytest.approx(0, abs=1e-6)


def test_ink_is_counted_where_patches_stay() -> None:
    torch.manual_seed(0)
    model = models.Segmenter("hybrid, keep 0.45", 3).eval()
    images, _, masks = Canvas("test", 6).batch_with_masks(range(6))
    with torch.inference_mode():
        model(images)
    kept, grid = sait.kept_mask(model.encoder.vit)
    assert kept.sum(1).tolist() == [29] * 6
    pixels = kept.view(6, *grid).repeat_interleave(8, 1).repeat_interleave(8, 2)
    want = (masks & pixels).sum((1, 2)) / masks.sum((1, 2))
    torch.testing.assert_close(segmentation.ink_kept(model, masks), want)
    model.encoder.set_plan(None)
    with torch.inference_mode():
        model(images)
    assert segmentation.ink_kept(model, masks).tolist() == [1] * 6


def test_an_image_alone_is_the_image_in_a_batch() -> None:
    torch.manual_seed(1)
    model = models.Segmenter("hybrid, keep 0.45", 3).eval()
    images, _ = Canvas("test", 5).batch(range(5))
    with torch.inference_mode():
        for block in model.encoder.vit.blocks:
            block.attn.qkv.weight.mul_(8)  # else the scores are so alike that rounding chooses
        together = model(images)
        for i in range(5):
            torch.testing.assert_close(model(images[i : i + 1])[0], together[i], rtol=1e-4, atol=1e-4)


def test_differences_over_seeds_are_paired() -> None:
    better = {0: np.array([0.5, 0.7]), 1: np.array([0.9, 0.9]), 2: np.array([1.0, 1.0])}
    worse = {0: np.array([0.4, 0.6]), 1: np.array([0.6, 0.6])}
    found = intervals.ahead(better, worse)
    assert found is not None
    assert found.mean == pytest.approx(20)
    t, deviation = 12.706, 20 / 2**0.5  # of one degree of freedom, and of 10 and 30 points
    assert (found.high - 20, 20 - found.low) == pytest.approx((t * deviation / 2**0.5,) * 2)  # images gain alike
    assert intervals.ahead(better, {3: np.array([0.0, 0.0])}) is None


def test_an_interval_covers_images_and_trainings() -> None:
    images = np.random.default_rng(0).random(400) / 10
    nothing = {seed: np.zeros(400) for seed in range(3)}
    alone = intervals.ahead({0: images}, nothing)
    alike = intervals.ahead({seed: images for seed in range(3)}, nothing)
    assert alone == alike == intervals.interval(100 * images), "trainings that do not differ add nothing"
    apart = intervals.ahead({seed: images + seed / 100 for seed in range(3)}, nothing)
    assert alone is not None
    assert apart is not None
    assert apart.mean == pytest.approx(alone.mean + 1)
    of_trainings = 4.303 / 3**0.5  # seeds 0, 1 and 2 points ahead deviate by one
    assert apart.high - apart.mean == pytest.approx(np.hypot(alone.high - alone.mean, of_trainings))
    assert apart.mean - apart.low == pytest.approx(np.hypot(alone.mean - alone.low, of_trainings))


def test_shares_survive_packing_and_others_are_refused() -> None:
    shares = np.random.default_rng(0).random(50)
    shares[:2] = 0, 1
    assert np.abs(intervals.unpack_shares(intervals.pack_shares(shares)) - shares).max() <= 1 / 131070
    with pytest.raises(ValueError, match="expected 0 to 1, got"):
        intervals.pack_shares(np.array([0.2, 1.1]))
