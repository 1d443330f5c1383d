"""sait train --method hot: the queries learn where a head reads patches, and are refused where it does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import sait
import short
import small
import torch
from sait import checkpoint
from sait.train import TrainingError

METHOD = {"method": "hot", "keep": 0.5, "blocks": [1], "model_kwargs": {**short.MODEL_KWARGS, "global_pool": "avg"}}


def test_queries_learn_and_are_loaded(tmp_path: Path) -> None:
    path = short.run(tmp_path, **METHOD, epochs=1)
    model, x = sait.load(path), small.images(2)
    assert sait.density(model).name == "HoT, keep 0.5, block 1"
    with torch.no_grad():
        assert model.forward_features(x).shape == (2, 17, 32)
    assert sait.selections(model)[0].cu_seqlens.tolist() == [0, 9, 18]
    tensors = checkpoint.read(path).tensors
    learned = {key: tensor for key, tensor in tensors.items() if key.startswith("sait_methods.recover.")}
    assert len(learned) == 11
    for name in ("query", "value", "proj"):
        assert learned[f"sait_methods.recover.{name}.bias"].abs().max() > 0, "began at zero"
    assert torch.equal(model.sait_methods["recover"].queries, learned["sait_methods.recover.queries"])


def test_a_head_that_reads_no_patch_teaches_nothing(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"^--method: hot recovers patches, .* Set model_kwargs\.global_pool"):
        short.run(tmp_path, **{**METHOD, "model_kwargs": short.MODEL_KWARGS})
