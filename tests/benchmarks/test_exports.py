"""`make exports`: the figures of a small model, and their table."""

from __future__ import annotations

import exports
import pytest
import sait
import schema
import timm
import torch
from report.exports import table
from sait.bench import measure

TINY = {"img_size": 64, "embed_dim": 64, "num_heads": 2, "depth": 4, "num_classes": 10}


def test_rows_and_table(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setattr(
        exports, "EXPORTS", [each for each in exports.EXPORTS if each.suffix != ".onnx" and not each.compiled]
    )
    torch.manual_seed(0)
    model = sait.sparsify(
        timm.create_model("vit_tiny_patch16_224", **TINY).eval(), block=exports.BLOCK, keep=exports.KEEP
    )
    rows = exports.rows_of("tiny", model, torch.randn(3, 3, 64, 64), repeats=1)
    document = measure.results(rows, kind=exports.KIND)
    schema.check_results(document)
    assert [row["case"] for row in rows] == [exports.OURS, *(each.label for each in exports.EXPORTS)]
    assert rows[0]["ratio"] == 1
    assert all(0 <= row["max_error"] < 1e-5 for row in rows)
    assert all(row["tokens"] == 1 + 8 for row in rows)
    text = table(document)
    assert (
        f"| OpenVINO | {rows[1]['max_error']:.1e} | {rows[1]['images_per_s']:.1f} ({rows[1]['ratio']:.2f}×) |" in text
    )
    assert "random weights" in text
