"""make comparison: the whole chain on the smallest sizes, and the parts of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import runner
import sait
import timm
import torch
from comparison import __main__ as command
from comparison import report, skipped, tuned
from comparison.settings import CHECKPOINT, DENSE, FULL, METHODS, QUICK, name_of
from intervals import pack
from sait.cost import macs
from sait.methods import PUBLISHED
from tiers import full_only


def test_every_method_is_a_config_of_its_own_arithmetic(tmp_path: Path) -> None:
    """And none is forgotten: what is published is compared, but for what recovers."""
    configs = {}
    for method in METHODS:
        for saved in (0.25, 0.55):
            variant = name_of(method.name, saved)
            configs[variant] = tuned.config_of(variant, 0, QUICK, tmp_path)
    assert {config.method for config in configs.values() if config.method} | {"hot"} == set(PUBLISHED)
    assert len({config.out for config in configs.values()}) == len(configs)
    for method in METHODS:
        few, many = (tuned.setting_of(method.name, saved, QUICK.sample) for saved in (0.55, 0.25))
        assert method.settings.index(few) < method.settings.index(many), method.name
    assert tuned.config_of(DENSE, 0, QUICK, tmp_path).mode == "dense"


@pytest.mark.parametrize("name", [method.name for method in METHODS if method.by_image])
def test_where_images_decide_the_setting_is_chosen_for_the_trained_model(name: str) -> None:
    """From any plan, also one of other blocks; the weights stay as they are."""
    model = sait.sparsify(sait.restore(sait.load(CHECKPOINT)), block=5, keep=0.9)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = [tuned.retune(model, tuned.told(name_of(name, saved), QUICK), QUICK.sample) for saved in (0.55, 0.25)]
    assert found[0] != found[1]
    model(tuned.pictures(QUICK.sample)[0])
    dense = macs(sait.restore(sait.load(CHECKPOINT)))
    # The steps of the settings are up to 0.13, and it began at 0.97.
    assert macs(model) / dense == pytest.approx(0.75, abs=0.04)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@full_only(lambda: True)  # a minute
def test_from_runs_to_tables(tmp_path: Path) -> None:
    words = ["--quick", "--results", str(tmp_path / "results.json"), "--out", str(tmp_path), "--runs", str(tmp_path)]
    command.main(words)
    document = json.loads((tmp_path / "results.json").read_text())
    assert {row["variant"] for row in document["rows"]} == {run.variant for run in command.runs(QUICK)}
    text = (tmp_path / "comparison.md").read_text()
    for name in (*QUICK.methods, *skipped.CASES):
        assert f"| {name} |" in text
    assert "-40%, bf16 ×" in report.summary(document)
    before = (tmp_path / "results.json").read_bytes()
    command.main(words)  # all is done
    assert (tmp_path / "results.json").read_bytes() == before


def test_the_table_says_who_is_ahead() -> None:
    def rows(variant: str, right: list[bool], **more: object) -> list[dict[str, object]]:
        packed = {"right": pack(np.array(right)), "images": len(right), "accuracy": np.mean(right)}
        same = {
            "experiment": "comparison",
            "variant": variant,
            "seed": 0,
            "gmac": 0.07,
            "tokens": 30.0,
            **packed,
            **more,
        }
        return [{**same, "case": case} for case in ("dense", "pruned")]

    found = rows("SaiT, -40%", [True, False] * 20, method="SaiT", saved=0.4, setting=0.45)
    found += rows("ToMe, -40%", [True] * 40, method="ToMe", saved=0.4, setting=6)
    found += rows("dense", [True] * 40, method="dense")[:1]
    text = report.markdown({"rows": found})
    lines = text.split("\n")
    order = [line.split(" | ")[0] for line in lines if line.startswith(("| dense", "| ToMe", "| SaiT"))]
    assert order == ["| dense", "| ToMe", "| SaiT"]
    assert "SaiT is not the best: ahead of it by more than the interval are ToMe by +50.00" in text
    assert "| SaiT | 0.45 | 50.00 ± 0.00 |  | 50.00 ± 0.00 | 0.0700 | 30.0 | 1 |" in lines
    assert "Not run yet" in report.markdown({"rows": []})


def test_gates_that_are_set_by_hand_leave_out_their_share() -> None:
    """Of what the blocks after the first compute; half of the heads leaves the MLP as it is."""
    plain = timm.create_model(skipped.MODEL).eval()
    models = {"no gates": plain, **{name: skipped.gated(plain, shares) for name, shares in skipped.CASES.items()}}
    images = torch.randn(skipped.BATCH, 3, 224, 224)
    found = {}
    for name, model in models.items():
        with torch.inference_mode():
            model(images)
        found[name] = macs(model)
    whole, first = found["everything"], found["nothing but the first block"]
    assert found["no gates"] == whole
    half = (whole + first) / 2
    assert found["half of the tokens"] == pytest.approx(half, rel=0.05)
    assert found["half of the sub-layers"] == pytest.approx(half, rel=0.15)  # 11 blocks of 16 images
    assert half < found["half of the heads"] < whole
    assert first < found["half of each"] < half


def test_each_method_has_three_densities_and_seeds() -> None:
    every = list(command.runs(FULL))
    assert len(every) == len(set(every)) == 3 * (1 + len(METHODS) * 3) + 2
    assert [run.name for run in every if runner.matches(run, "comparison/EViT, -40%")] == [
        f"comparison/EViT, -40%/{seed}" for seed in range(3)
    ]
