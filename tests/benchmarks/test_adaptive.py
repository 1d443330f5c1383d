"""What one would use in place of ours where images keep different numbers of patches: each computes what it says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sait.bench.peers
import torch
from peers import PEERS, Made, Setting
from peers.adaptive import OfCount, Padded
from sait.bench.plain import PlainPruning
from tiny import images, small_vit
from torch import Tensor

COUNTS = (12, 5, 20)
ADAPTIVE = [name for name, peer in PEERS.items() if peer.adaptive]


def setting(counts: tuple[int, ...] | None = COUNTS) -> Setting:
    return Setting(small_vit().float(), images().float(), block=1, keep=0.45, mass=0.9, counts=counts)


def one_by_one(of: Setting, counts: tuple[int, ...]) -> Tensor:
    plain = PlainPruning(of.vit, of.block, 1.0)
    return torch.cat([plain(image[None], count) for image, count in zip(of.images, counts, strict=True)])


def made(name: str, of: Setting, monkeypatch: pytest.MonkeyPatch) -> Made:
    if name.startswith("openvino"):
        pytest.importorskip("openvino")
    monkeypatch.setattr("peers.adaptive.compiled", lambda module: module)
    return PEERS[name].make(of)


@pytest.mark.parametrize("name", ADAPTIVE)
@torch.inference_mode()
def test_logits_are_those_of_as_many_patches_of_each_image(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of = setting()
    peer = made(name, of, monkeypatch)
    assert peer.kept == ((20, 20, 20) if name == "openvino-largest" else COUNTS)
    expected = one_by_one(of, peer.kept)
    torch.testing.assert_close(peer.forward(of.images), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, one_by_one(of, (13, 5, 20)), rtol=1e-4, atol=1e-5), "the check sees one patch"


@pytest.mark.parametrize("name", ADAPTIVE)
def test_arithmetic_is_that_of_the_largest_number_where_all_compute_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = setting()
    assert made(name, of, monkeypatch).rows is not None
    left = made(name, of, monkeypatch).rows[-1].left
    assert left == pytest.approx(1 + sum(COUNTS) / 3 if name == "openvino-each" else 21)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_without_numbers_the_option_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="--adaptive"):
        made(name, setting(None), monkeypatch)


def test_the_padding_of_the_compiled_one_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = []
    monkeypatch.setattr("torch.compile", lambda module, **options: modules.append((module, options)) or module)
    PEERS["padded-compiled"].make(setting())
    ((module, options),) = modules
    assert isinstance(module, Padded)
    assert options == {"mode": "default", "dynamic": False}


@torch.inference_mode()
def test_nobody_attends_to_the_padding() -> None:
    """What stands there changes nothing; without the mask it does."""
    of = setting()
    padded, plain = Padded(of.vit, of.block), PlainPruning(of.vit, of.block, 1.0)
    counts, largest = torch.tensor(COUNTS), max(COUNTS)
    expected = padded(of.images, counts, largest)

    def other_padding(scores: Tensor) -> tuple[Tensor, Tensor]:
        best = scores.topk(largest).indices
        stays = torch.arange(largest) < counts[:, None]
        return best.where(stays, 0), stays

    torch.testing.assert_close(plain.pruned(of.images, other_padding), expected)
    assert not torch.allclose(plain.pruned(of.images, lambda scores: (other_padding(scores)[0], None)), expected)


def test_a_head_that_reads_patches_would_count_the_padding() -> None:
    with pytest.raises(ValueError, match="reads patches"):
        Padded(small_vit(global_pool="avg"), 1)


@torch.inference_mode()
def test_one_compiled_model_serves_any_number_and_any_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    of = setting()
    plain = PlainPruning(of.vit, of.block, 1.0)
    engine = OfCount(plain, of.images)
    for batch in (of.images, of.images[:1]):
        for count in (1, 7, 25):
            torch.testing.assert_close(engine(batch, count), plain(batch, count), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("counts", [None, COUNTS])
def test_ours_is_held_to_the_numbers_where_there_are_some(counts: tuple[int, ...] | None) -> None:
    of = replace(setting(), counts=counts)
    assert {PEERS[name].make(of).kept for name in ("ours-mass", "ours-optimized-mass")} == {counts}
    assert PEERS["ours"].make(of).kept is None


def test_those_of_a_fixed_share_are_none_of_them() -> None:
    assert ADAPTIVE == ["openvino-largest", "openvino-each", "padded", "padded-compiled"]
    assert not any(PEERS[name].same_pruning for name in ADAPTIVE)
    assert not any(peer.adaptive for peer in sait.bench.peers.PEERS.values())
