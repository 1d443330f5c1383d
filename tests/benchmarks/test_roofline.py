"""The floor's arithmetic: operations as sait.macs counts them, bytes as counted by hand."""

from __future__ import annotations

import pytest
import roofline
import sait
import torch
from roofline import RooflineCost, Roofs
from sait import Plan, Stage
from sait.cost import Rows, plan_rows, rows_for_head
from tiny import images, small_vit
from typer.testing import CliRunner

import sait_kernels as sk

PLANS = {
    "one stage": Plan([Stage(1, 0.45)]),
    "two stages": Plan([Stage(1, 0.7), Stage(3, 3)], score="column"),
    "all": Plan([Stage(2, 1.0)]),
}


@pytest.mark.parametrize("name", ["vit_small_patch16_224", "deit_small_distilled_patch16_224"])
@pytest.mark.parametrize("plan", PLANS)
def test_operations_are_those_of_macs(name: str, plan: str) -> None:
    vit = small_vit(name)
    found = roofline.parts(vit, plan_rows(vit, PLANS[plan]), 5, 4)
    assert sum(part.flop for part in found) == 2 * 5 * sait.macs(vit, PLANS[plan])
    assert roofline.gmac(found, 5) == pytest.approx(sait.macs(vit, PLANS[plan]) / 1e9)
    dense = roofline.parts(vit, plan_rows(vit, None), 5, 4)
    assert sum(part.flop for part in dense) == 2 * 5 * sait.macs(vit)


@torch.inference_mode()
def test_with_mass_the_counts_are_given() -> None:
    vit = small_vit()
    model = sait.sparsify(vit, block=1, mass=0.5)
    with sk.backend("reference"):
        model(images(1))
    (kept,) = sait.selections(model)[0].cu_seqlens.diff().tolist()
    rows = plan_rows(vit, Plan([Stage(1, mass=0.5)]), [kept])
    assert sum(part.flop for part in roofline.parts(vit, rows, 1, 4)) == 2 * sait.macs(model)


def test_rows_that_the_head_reads() -> None:
    """26 tokens, one of them a prefix: what follows the attention of the last block is for that one."""
    vit = small_vit()
    rows = plan_rows(vit, PLANS["all"])
    for_head = rows_for_head(vit, rows)
    assert for_head[:-1] == rows[:-1]
    left_out = 25 * (64 * 64 + 2 * 64 * 256 + 2 * 26 * 64)
    assert roofline.gmac(roofline.parts(vit, rows, 3, 4), 3) - roofline.gmac(
        roofline.parts(vit, for_head, 3, 4), 3
    ) == pytest.approx(left_out / 1e9)


def test_bytes_by_hand() -> None:
    """25 patches of 3 * 16 * 16 values, 26 tokens, C = 64, two images, bf16; block 1 keeps 12 patches, 13 rows."""
    vit = small_vit()
    found = {part.name: part for part in roofline.parts(vit, plan_rows(vit, PLANS["one stage"]), 2, 2)}
    assert len(found) == 1 + 4 * 6 + 1
    moved = {
        "patch embedding": 2 * (3 * 80 * 80 + 26 * 64) + 3 * 16 * 16 * 64 + 26 * 64,  # images, tokens; weights, places
        "0 attention": 2 * (3 * 26 * 64 + 26 * 64),
        "1 norm1 + qkv": 2 * (26 * 64 + 26 * 192) + 64 * 192,
        "1 attention": 2 * (13 * 64 + 2 * 26 * 64 + 13 * 64),  # q of kept rows, k and v of all; the result
        "1 proj": 2 * (13 * 64 + 13 * 64) + 64 * 64,
        "1 residual + norm2": 2 * (4 * 13 * 64) + 2 * 64,
        "2 fc1 + GELU": 2 * (13 * 64 + 13 * 256) + 64 * 256,
        "3 fc2 + residual": 2 * (13 * 256 + 2 * 13 * 64) + 256 * 64,
        "head": 2 * (64 + 24) + 64 * 24,
    }
    assert {name: found[name].bytes for name in moved} == {name: 2 * elements for name, elements in moved.items()}


def test_the_longer_of_two_times() -> None:
    roofs = Roofs(copy_tbps=2.0, matmul_tflops=100.0)
    assert RooflineCost("0 proj", bytes=4e12, flop=1e14).seconds(roofs) == 2.0
    assert RooflineCost("1 proj", bytes=1e12, flop=3e14).seconds(roofs) == 3.0
    found = [RooflineCost("0 proj", 4e12, 1e14), RooflineCost("1 proj", 1e12, 3e14), RooflineCost("head", 2e12, 0)]
    assert roofline.floor(found, roofs) == 6.0
    assert roofline.by_kind(found, roofs) == {"proj": 5.0, "head": 1.0}


def test_what_reads_everything_before_it_prunes_costs_more() -> None:
    vit = small_vit()
    ours = plan_rows(vit, PLANS["one stage"])
    assert ours[1] == Rows(26, 13, 13, 13, choosing=26 * 64)
    late = [rows._replace(queries=rows.entering, projected=rows.entering) for rows in ours]
    roofs = Roofs(1.0, 1.0)
    assert roofline.floor(roofline.parts(vit, late, 1, 2), roofs) > roofline.floor(
        roofline.parts(vit, ours, 1, 2), roofs
    )


def test_a_model_of_another_kind_is_refused() -> None:
    vit = small_vit("vit_base_patch16_siglip_224")
    with pytest.raises(ValueError, match="attention pooling"):
        roofline.parts(vit, plan_rows(vit, None), 1, 2)


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    import typer

    app = typer.Typer()
    app.command()(roofline.main)
    roofs = ["--copy-tbps", "4.3", "--matmul-tflops", "790"]
    run = CliRunner().invoke(app, ["--keep", "1", "--batch", "256", *roofs])
    assert run.exit_code == 0, run.output
    for words in ("3 attention", "total", "4.60 GMAC an image", "memory", "GEMMs"):
        assert words in run.output
