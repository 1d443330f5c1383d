"""`make families`: figures of a small model, and the page that shows them."""

from __future__ import annotations

import json
from pathlib import Path

import families
import pytest
import schema
import timm
import torch
from sait.bench import measure
from sait_cli.options import DType

TINY = {"img_size": 64, "embed_dim": 64, "num_heads": 2, "depth": 4, "num_classes": 10}


@pytest.fixture
def tiny() -> families.FamilyModel:
    name = "vit_small_patch16_dinov3"
    return families.FamilyModel(name, lambda: timm.create_model(name, **TINY), families.TIMM, 64)


def test_rows_and_page(tiny: families.FamilyModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(families, "BLOCK", 1)
    monkeypatch.setattr(families, "PAGE", tmp_path / "families.md")
    torch.manual_seed(0)
    rows = families.rows_of(tiny, tiny.make().eval(), DType.fp32, batch=2, repeats=1)
    document = measure.results(rows, kind=families.KIND)
    schema.check_results(document)
    assert [row["case"] for row in rows] == ["dense", "pruned", "optimized"]
    assert [row["tokens"] for row in rows] == [5 + 16, 5 + 8, 5 + 8]
    assert rows[0]["ratio"] == 1
    assert all(0 < row["max_error"] < 1e-5 for row in rows)
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(document), encoding="utf-8")
    families.main(page_only=file)
    text = (tmp_path / "families.md").read_text(encoding="utf-8")
    assert f"({rows[1]['ratio']:.2f}×) | {rows[2]['images_per_s']:.1f} ({rows[2]['ratio']:.2f}×) |" in text
    for name, (module, _) in families.FILES.items():
        assert f"| {name} | {families.lines_of(module)} |" in text


def test_every_family_has_a_model() -> None:
    """Each file of sait.families that is one is on the page, and each model of the list can be built."""
    folder = families.ROOT / "python" / "sait" / "families"
    files = {path.stem for path in folder.glob("*.py")} - {"__init__", "base", "cutting", "pooling"}
    assert {module for module, _ in families.FILES.values()} == files
    pytest.importorskip("transformers", reason="the oldest stack has none")
    with torch.device("meta"):
        for subject in families.SUBJECTS:
            assert families.family_of(type(subject.make())) is not None, subject.label
