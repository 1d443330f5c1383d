"""make pretrain: the whole chain on the smallest size, equal multiply-adds, and what its tasks teach."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import intervals
import pytest
import recorded
import runner
import sait
import torch
import torch.nn.functional as F
from pretrain import __main__ as command
from pretrain import report, tasks, training
from pretrain.settings import EQUAL, FULL, IMG_SIZE, KEEP, MASKED, PATCH, QUICK, VARIANTS
from sait.data import Canvas
from torch.utils.flop_counter import FlopCounterMode

PATCHES = (IMG_SIZE // PATCH) ** 2


def test_from_runs_to_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "results.json", tmp_path / "docs"
    words = ["--quick", "--results", str(path), "--out", str(out)]
    command.main(words)
    document = json.loads(path.read_text())
    assert recorded.done(document) == set(command.runs(QUICK))
    for variant in VARIANTS:
        rows = [row for row in document["rows"] if row["variant"] == variant]
        assert [row["labels"] for row in rows] == list(QUICK.labels)
        for row in rows:
            right = intervals.unpack(row["right"], row["images"])
            assert row["images"] == QUICK.test_images
            assert right.mean() == pytest.approx(row["accuracy"], abs=1e-4)
            assert (row["pretraining_images"] == 0) == variant.startswith("scratch")
            assert (row["pretraining_loss"] is None) == variant.startswith("scratch")
    text = (out / "pretrain.md").read_text()
    assert "Not run yet" not in text
    for wanted in (*VARIANTS, "8 labels, replaced against MASK token", "| labels | ", "What was predicted"):
        assert wanted in text

    before = path.read_bytes()
    capsys.readouterr()
    command.main(words)  # all is done
    assert capsys.readouterr().out == ""
    assert path.read_bytes() == before
    command.main([*words, "--list", "--only", "accuracy/scratch"])
    assert capsys.readouterr().out == "done  accuracy/scratch/0\n"


def test_the_report_is_of_the_results() -> None:
    document = recorded.read(runner.ROOT / "experiments" / "pretrain" / "results.json")
    assert (runner.ROOT / "docs" / "pretrain.md").read_text(encoding="utf-8") == report.markdown(document)


def test_a_report_without_runs_says_so() -> None:
    assert "Not run yet: `make pretrain`." in report.markdown({"rows": []})
    assert len(list(command.runs(FULL))) == FULL.seeds * len(VARIANTS) + 1


@pytest.mark.parametrize("size", [FULL, QUICK])
def test_pre_trainings_have_equal_multiply_adds(size) -> None:
    found = {variant: tasks.steps_of(variant, size) for variant in VARIANTS}
    assert found["scratch"] == (0, 0)
    steps, wanted = found["replaced"]
    assert steps == size.steps
    for variant in VARIANTS[1:]:
        assert abs(found[variant][1] / wanted - 1) <= EQUAL
    assert found["replaced, nothing dropped"][0] < 0.6 * steps  # each of its images has twice the patches


def test_multiply_adds_are_what_torch_counts() -> None:
    """Of the forward of each task: a backward is twice as much by rule."""
    images, labels = training.pictures("train", 2, 0).batch(range(2))
    for variant in VARIANTS:
        task = tasks.task_of(variant, tasks.build(2)).eval()
        for block in task.encoder.blocks:
            block.attn.fused_attn = False  # of torch's fused attention the CPU's is not counted
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            task(images, labels)
        counted = counter.get_total_flops() / 2 / len(images)
        head = 0 if variant.startswith("scratch") else task.encoder.head.weight.numel()  # which labels alone read
        assert task.macs() - head == pytest.approx(counted, rel=1e-6), variant


def test_too_few_steps_for_equal_multiply_adds() -> None:
    with pytest.raises(ValueError, match=r"expected multiply-adds within 3% of .* Choose more steps"):
        tasks.steps_of("MASK token", dataclasses.replace(QUICK, steps=1, batch=64))


def test_a_token_stands_for_what_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    task = tasks.MaskToken(tasks.build(1))
    with torch.no_grad():
        task.token.fill_(7.0)
    images, labels = training.pictures("train", 3, 0).batch(range(3))
    seen: list[torch.Tensor] = []
    whole = task.encoder.forward_features
    monkeypatch.setattr(task.encoder, "forward_features", lambda x: seen.append(x) or whole(x))
    told: list[torch.Tensor] = []
    task.head.register_forward_hook(lambda _module, _inputs, output: told.append(output))
    loss = task(images, labels)
    patches = F.unfold(seen[0], PATCH, stride=PATCH).transpose(1, 2)  # (B, patches, pixels)
    hidden = (patches == 7).all(2)
    assert hidden.sum(1).tolist() == [round(MASKED * PATCHES)] * 3
    real = F.unfold(images, PATCH, stride=PATCH).transpose(1, 2)
    assert torch.equal(patches[~hidden], real[~hidden])
    assert loss.item() == pytest.approx((told[0].float() - real)[hidden].abs().mean().item(), rel=1e-4)
    loss.backward()
    assert task.token.grad is not None
    assert task.token.grad.abs().min() > 0


def test_replaced_patches_drop_and_the_model_is_whole_afterwards() -> None:
    torch.manual_seed(0)
    model = tasks.build(1)
    before, names = {k: v.clone() for k, v in model.state_dict().items()}, type(model)
    losses = training.pretrained(model, "replaced", 2, 0, QUICK)
    assert len(losses) == 2
    assert type(model) is names
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert any(not torch.equal(after[key], before[key]) for key in before)
    task = tasks.ReplacedPatches(tasks.build(1), KEEP)
    task(*training.pictures("train", 2, 0).batch(range(2)))
    (left,) = sait.selections(task.encoder)
    assert left.cu_seqlens.diff().tolist() == [PATCHES * KEEP] * 2


def test_all_variants_of_a_seed_learn_the_same_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []

    class Watched(Canvas):
        def batch(self, indices):
            images, labels = super().batch(indices)
            seen.append(labels.tolist())
            return images, labels

    monkeypatch.setattr(training, "Canvas", Watched)
    training.tuned(tasks.build(1), 6, 3, 1, QUICK)
    first = [*seen]
    seen.clear()
    training.tuned(tasks.build(1), 6, 5, 1, QUICK)
    assert seen[:3] == first
    assert sorted([*itertools.chain(*seen)][:6]) == sorted(
        Canvas("train", 6, (1, training.LABELLED)).placements.label.tolist()
    )
