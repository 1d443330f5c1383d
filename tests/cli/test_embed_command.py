"""sait embed and sait predict: what is typed, what is said, and one line about whatever is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("pyarrow", reason="the extra [embed]")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import sait
import timm
import torch
import typer
from PIL import Image
from sait.embed import read, run
from sait_cli import embed as command
from sait_cli import main

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
FEW = "--batch 4 --part 4 --workers 0"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photos: five images and one that is none; model.safetensors: a small sparse model; empty: nothing."""
    at = tmp_path_factory.mktemp("work")
    (at / "photos").mkdir()
    (at / "empty").mkdir()
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(at / "photos" / f"{i}.png")
    (at / "photos" / "broken.jpg").write_bytes(b"no image")
    pq.write_table(pa.table({"label": [1]}), at / "labels.parquet")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    sait.save(
        sait.sparsify(model, block=1, keep=0.5), at / "model.safetensors", name="vit_tiny_patch16_224", kwargs=SMALL
    )
    return at


def typed(words: str, work: Path, out: Path, code: int = 0) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(words.replace("WORK", str(work)).replace("OUT", str(out)).split())
    assert exit_.value.code == code


def test_embed(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"embed WORK/photos --out OUT --model WORK/model.safetensors {FEW}"
    typed(words, work, tmp_path)
    printed = capsys.readouterr().out
    assert printed.startswith(
        f"{work}/model.safetensors; block 1: ClassAttention(), TopK(keep=0.5); 6 images of {work}"
    )
    for said in ("6 images in", "broken.jpg: no image", "tokens: 9.0 of 17", "fewer than the", "the limit: "):
        assert said in printed
    found = read(tmp_path)
    assert found.column_names == ["key", "embedding", "tokens", "error"]
    assert found["key"].to_pylist() == ["0.png", "1.png", "2.png", "3.png", "4.png", "broken.jpg"]
    typed(words, work, tmp_path)
    assert "0 images in" in capsys.readouterr().out
    typed(words.replace("photos", "photos/0.png"), work, tmp_path / "one")
    typed(f"{words} --mass 0.5", work, tmp_path, code=2)
    assert "--out: " in (said := capsys.readouterr().err)
    assert "was begun with density" in said


def test_predict(work: Path, tmp_path: Path) -> None:
    typed(f"predict WORK/photos --out OUT --model WORK/model.safetensors --mass 0.5 --dtype bf16 {FEW}", work, tmp_path)
    assert read(tmp_path).column_names == ["key", "label", "name", "score", "tokens", "error"]


def test_a_model_of_timm_is_dense_unless_it_is_asked(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"embed WORK/photos --out OUT --model test_vit --weights random {FEW}"
    typed(words, work, tmp_path / "dense")
    assert "test_vit, random weights; dense mode; 6 images" in capsys.readouterr().out
    typed(f"{words} --mass 0.5 --max-keep 20 --block 2 --store fp16", work, tmp_path / "sparse")
    assert "block=2, mass=0.5, max_keep=20, score=cls; 6 images" in capsys.readouterr().out
    kept = [set(read(tmp_path / name)["tokens"].to_pylist()) - {None} for name in ("dense", "sparse")]
    assert kept[0] == {101}
    assert max(kept[1]) <= 21
    assert read(tmp_path / "sparse").schema.field("embedding").type.value_type == pa.float16()


def test_random_weights_are_only_taken_if_they_are_meant(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command.options, "_pretrained", lambda name: None)
    typed("embed WORK/photos --out OUT --model test_vit", work, tmp_path, code=2)
    assert "--weights: expected trained ones, got random weights" in capsys.readouterr().err


SHARDS = {
    "alone": ({}, (1, 1)),
    "torchrun": ({"RANK": "2", "WORLD_SIZE": "4", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, (3, 4)),
    "slurm": ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (1, 8)),
    "half of it": ({"RANK": "2"}, (1, 1)),
}


@pytest.mark.parametrize("launcher", SHARDS)
def test_launchers_say_which_process_it_is(launcher: str) -> None:
    environment, wanted = SHARDS[launcher]
    assert command.shard_of(None, environment)[0] == wanted
    assert command.shard_of("5/9", environment)[0] == (5, 9)
    with pytest.raises(typer.BadParameter):
        command.shard_of("5", environment)


def test_processes_of_a_machine_take_turns_at_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert command.device_of("cuda", {"LOCAL_RANK": "3"}) == "cuda:1"
    assert command.device_of("cuda", {"SLURM_LOCALID": "0"}) == "cuda:0"
    assert command.device_of("cuda", {}) == "cuda"
    assert command.device_of("cuda:1", {"LOCAL_RANK": "0"}) == "cuda:1"
    assert command.device_of("cpu", {"LOCAL_RANK": "1"}) == "cpu"


def test_processes_of_a_launcher_share_the_parts(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        typed(f"embed WORK/photos --out OUT --model WORK/model.safetensors {FEW}", work, tmp_path)
        there = sorted(file.name for file in tmp_path.glob("part*"))
        assert there == ["part-000001.parquet"] if rank == "1" else len(there) == 2
    assert read(tmp_path).num_rows == 6


def test_stopped_by_its_user(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run.engine, "run", stop)
    typed(f"embed WORK/photos --out OUT --model WORK/model.safetensors {FEW}", work, tmp_path, code=130)
    assert capsys.readouterr().err == "sait: stopped; the same command goes on where it was.\n"


# what is typed behind `sait embed` -> what the line must say
BAD = {
    "WORK/nowhere --out OUT": "SOURCE: expected a folder, a list, a .parquet or a .tar file; there is no",
    "WORK/empty --out OUT": "found none",
    "WORK/labels.parquet --out OUT": "--column: expected the column of images in",
    "WORK/labels.parquet --out OUT --column image": "--column: expected one of label",
    "WORK/photos --out OUT --column image": "--column: expected it with Parquet files",
    "WORK/photos --out WORK/model.safetensors": "--out: cannot write into",
    "WORK/photos --out WORK/photos/out": "--out: expected a folder outside of",
    "WORK/photos --out OUT --shard 3/2": "--shard: there is no shard 3/2; expected 1/2 to 2/2",
    "WORK/photos --out OUT --shard 0/2": "--shard: there is no shard 0/2",
    "WORK/photos --out OUT --shard two": "--shard: expected I/N such as 2/8",
    "WORK/photos --out OUT --keep 0.5 --mass 0.5": "--mass: expected one of --keep and --mass",
    "WORK/photos --out OUT --keep 88": "--keep: expected a share",
    "WORK/photos --out OUT --max-keep 8": "--max-keep: expected a --mass",
    "WORK/photos --out OUT --max-pixels 0": "--max-pixels: expected 1 to",
    "WORK/photos --out OUT --batch 0": "--batch",
    "WORK/photos --out OUT --block 1": "--block: ",
    "WORK/photos --out OUT --weights random": "--weights: ",
    "WORK/photos --out OUT --engine dask": "--engine",
    "WORK/photos --out OUT --device cuda:99": "GPUs",
    "WORK/photos --out OUT --model nowhere.safetensors": "--model: cannot read nowhere.safetensors",
    "WORK/photos --out OUT --model resnet50": "its class defines another forward",
    "WORK/photos --out OUT --model deit_tiny_patch16_224 --weights random --block 12 --keep 0.5": "0 to 11",
    "WORK/photos --out OUT --model vit_base_patch16_gap_224 --weights random --keep 0.5": "column",
}


@pytest.mark.parametrize("words", BAD)
def test_one_line_and_exit_code_two(words: str, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "--model" not in words:
        words += " --model WORK/model.safetensors"
    typed(f"embed {words}", work, tmp_path / "out", code=2)
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    assert BAD[words.removesuffix(" --model WORK/model.safetensors")] in said
    assert not list((tmp_path / "out").glob("*"))
