"""embed and predict: the model's own answers, row by row, however they are batched, sharded or interrupted."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pyarrow", reason="the extra [embed]")

import pictures
import sait
import torch
from pictures import small
from PIL import Image
from sait.data.photos import Preprocessing, preprocessing_of, to_tensor
from sait.embed import BadInput, Settings, embed, job, predict, read
from sait.embed import run as module
from sait.embed.decode import Seconds

IMAGES = 21
FEW = Settings(batch=4, part=8, workers=0)
DENSITIES = [{}, {"keep": 0.5}, {"mass": 0.5}]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 images, and two files that are none."""
    at = pictures.folder(tmp_path_factory.mktemp("source") / "photos", IMAGES)
    (at / "000-broken.jpg").write_bytes(b"no image")
    (at / "deeper" / "cut.jpg").write_bytes(pictures.encoded(0, "JPEG")[:200])
    return at


def rows(out: Path) -> dict[str, dict[str, Any]]:
    found = read(out).to_pylist()
    assert len({row["key"] for row in found}) == len(found)
    return {row["key"]: row for row in found}


def image_of(photos: Path, key: str, model: Any) -> torch.Tensor:
    photo = Image.open(io.BytesIO((photos / key).read_bytes()))
    return to_tensor(photo, preprocessing_of(model))[None]


@pytest.mark.parametrize("density", DENSITIES, ids=str)
def test_features_are_what_the_head_reads(density: dict[str, float], photos: Path, tmp_path: Path) -> None:
    """Each image alone through the model, whose head is the identity; batch mates change no more than rounding."""
    report = embed(small(**density), photos, tmp_path, FEW)
    found = rows(tmp_path)
    assert list(found) == sorted(found)
    assert {key for key, row in found.items() if row["error"]} == {"000-broken.jpg", "deeper/cut.jpg"}
    model = small(**density)
    model.head = torch.nn.Identity()
    counts = set()
    with torch.inference_mode():
        for key, row in found.items():
            if row["error"] is None:
                wanted = model(image_of(photos, key, model))[0]
                torch.testing.assert_close(torch.tensor(row["embedding"]), wanted, rtol=1e-5, atol=1e-5)
                kept = sait.selections(model)[-1].cu_seqlens[-1].item() if density else pictures.TOKENS
                assert row["tokens"] == kept
                counts.add(kept)
    assert len(counts) == 1 or density == {"mass": 0.5}
    assert report.totals.images == IMAGES + 2
    assert report.totals.failed == 2
    assert {n for counts in report.totals.kept for n in counts} == counts


def test_a_model_without_a_class_token(photos: Path, tmp_path: Path) -> None:
    """Adaptive density and pooling over patches, which forward_head of padded features refuses."""
    torch.manual_seed(0)
    options = {**pictures.SMALL, "class_token": False, "global_pool": "avg"}
    model = sait.sparsify(
        pictures.timm.create_model(pictures.NAME, **options).eval(), block=1, mass=0.7, score="column"
    )
    embed(model, photos, tmp_path, FEW)
    model.head = torch.nn.Identity()
    with torch.inference_mode():
        for key, row in list(rows(tmp_path).items())[1:4]:
            wanted = model(image_of(photos, key, model))[0]
            torch.testing.assert_close(torch.tensor(row["embedding"]), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("density", DENSITIES[1:], ids=str)
def test_predictions(density: dict[str, float], photos: Path, tmp_path: Path) -> None:
    predict(small(**density), photos, tmp_path, FEW)
    model = small(**density)
    with torch.inference_mode():
        for key, row in rows(tmp_path).items():
            assert list(row) == ["key", "label", "score", "tokens", "error"]  # five classes of nobody have no names
            if row["error"] is None:
                score, label = model(image_of(photos, key, model)).softmax(1)[0].max(0)
                assert row["label"] == label
                assert row["score"] == pytest.approx(score.item(), rel=1e-4)


def test_classes_have_names(photos: Path, tmp_path: Path) -> None:
    predict(small(keep=0.5, num_classes=1000), photos, tmp_path, FEW)
    found = rows(tmp_path)
    assert all((row["name"] is None) == (row["error"] is not None) for row in found.values())
    assert all(isinstance(row["name"], str) for row in found.values() if row["error"] is None)


@pytest.mark.parametrize("shards", [1, 3])
def test_shards_make_the_same_rows(shards: int, photos: Path, tmp_path: Path) -> None:
    """In any order, and with workers or without."""
    model = small(mass=0.5)
    embed(model, photos, tmp_path / "one", FEW)
    for i in reversed(range(shards)):
        changes = {"shard": (i + 1, shards), "workers": i % 2}
        embed(model, photos, tmp_path / "many", Settings(**{**FEW.__dict__, **changes}))
    assert pictures.same_rows(read(tmp_path / "many"), read(tmp_path / "one"))


def test_another_number_of_shards_goes_on(photos: Path, tmp_path: Path) -> None:
    model = small(keep=0.5)
    first = embed(model, photos, tmp_path, Settings(batch=4, part=8, workers=0, shard=(2, 3)))
    second = embed(model, photos, tmp_path, FEW)
    third = embed(model, photos, tmp_path, FEW)
    assert (first.totals.images, second.totals.images, third.totals.images) == (8, IMAGES + 2 - 8, 0)
    assert (first.before, second.before, third.before) == (0, 8, IMAGES + 2)
    assert list(third.lines()) == [f"0 images in {third.seconds:.1f} s, 0.0 images/s; {IMAGES + 2} were there"]
    assert len(rows(tmp_path)) == IMAGES + 2


def test_every_kind_of_source_gives_the_same_rows(tmp_path: Path) -> None:
    files = [pictures.encoded(i) for i in range(6)]
    for i, data in enumerate(files):
        (tmp_path / f"{i:03d}.png").write_bytes(data)
    (tmp_path / "list.txt").write_text("".join(f"{i:03d}.png\n" for i in range(6)))
    sources = [
        tmp_path / "list.txt",
        pictures.tar(tmp_path / "shard.tar", range(6)),
        pictures.parquet(tmp_path / "bytes.parquet", {"image": files}),
        pictures.parquet(tmp_path / "paths.parquet", {"path": [f"{i:03d}.png" for i in range(6)]}),
    ]
    model, found = small(keep=0.5), []
    for i, source in enumerate(sources):
        embed(model, source, tmp_path / f"out{i}", Settings(batch=4, workers=2))
        found.append(read(tmp_path / f"out{i}").drop_columns("key"))
    assert found[0]["error"].null_count == 6
    assert all(pictures.same_rows(other, found[0]) for other in found[1:])


def test_the_document_says_what_the_parts_hold(photos: Path, tmp_path: Path) -> None:
    model = small(keep=0.5)
    embed(model, photos, tmp_path, FEW)
    document = json.loads((tmp_path / "_run.json").read_text())
    settings = document["settings"]
    assert settings["density"]["stages"] == [{"block": 1, "keep": 0.5}]
    assert (settings["images"], settings["part"], settings["dtype"]) == (IMAGES + 2, 8, "float32")
    assert len(settings["weights"]) == len(settings["keys"]) == 64
    assert set(document["versions"]) == {"python", "torch", "timm", "sait_kernels"}


def test_other_settings_are_refused(photos: Path, tmp_path: Path) -> None:
    embed(small(keep=0.5), photos, tmp_path, FEW)

    def refused(model: Any, settings: Settings = FEW, run: Any = embed) -> str:
        with pytest.raises(BadInput) as error:
            run(model, photos, tmp_path, settings)
        assert "\n" not in str(error.value)
        return str(error.value)

    other = small(keep=0.5)
    other.blocks[0].mlp.fc1.bias.data += 1
    assert "weights" in refused(other)
    assert "density" in refused(small(mass=0.5))
    assert "command" in refused(small(keep=0.5), run=predict)
    assert "dtype" in refused(small(keep=0.5), Settings(part=8, dtype=torch.bfloat16))
    assert "part" in refused(small(keep=0.5), Settings(part=9))
    assert "store" in refused(small(keep=0.5), Settings(part=8, half=True))
    (photos / "zzz.png").write_bytes(b"")
    try:
        assert "images 23, got 24" in refused(small(keep=0.5))
    finally:
        (photos / "zzz.png").unlink()
    embed(small(keep=0.5), photos, tmp_path, Settings(part=8, batch=7))  # how many at a time decides no row


def test_adaptive_batches_are_filled_by_cost(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens: up to twice the images; a fixed share keeps to the number that was asked for."""
    sizes: list[int] = []
    original = job.Subject.__call__
    monkeypatch.setattr(job.Subject, "__call__", lambda self, x: sizes.append(len(x)) or original(self, x))
    embed(small(keep=0.1), photos, tmp_path / "fixed", Settings(batch=4, workers=0))
    assert sizes == [4, 4, 4, 4, 4, 1]
    sizes.clear()
    report = embed(small(mass=1e-6), photos, tmp_path / "adaptive", Settings(batch=4, workers=0))
    assert report.totals.kept == {(2,): IMAGES}
    # One block of three has all 17 tokens, the stage's and the last one leave 2: 4 * 51 / 21 images are as many rows.
    assert sizes == [4, 8, 8, 1]


def test_numbers_that_are_not_finite_are_an_error(photos: Path, tmp_path: Path) -> None:
    model = small(keep=0.5)
    model.norm.bias.data[0] = torch.inf
    report = embed(model, photos, tmp_path, FEW)
    assert report.totals.failed == IMAGES + 2
    assert all("not finite" in row["error"] for key, row in rows(tmp_path).items() if key == "002.png")


def test_numbers_that_half_precision_cannot_hold_are_an_error(photos: Path, tmp_path: Path) -> None:
    model = small(keep=0.5)
    model.norm.bias.data[0] = 1e5
    report = embed(model, photos, tmp_path, Settings(batch=4, part=8, workers=0, half=True))
    assert report.totals.failed == IMAGES + 2


def test_half_precision(photos: Path, tmp_path: Path) -> None:
    embed(small(keep=0.5), photos, tmp_path / "whole", FEW)
    embed(small(keep=0.5), photos, tmp_path / "half", Settings(batch=4, part=8, workers=0, half=True))
    for key, row in rows(tmp_path / "whole").items():
        if row["error"] is None:
            half = torch.tensor(rows(tmp_path / "half")[key]["embedding"])
            assert torch.equal(half, torch.tensor(row["embedding"]).half().float())
            break


def test_the_report(photos: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    begun: list[tuple[int, int]] = []
    more = {"begin": lambda *numbers: begun.append(numbers), "advance": seen.append}
    report = embed(small(mass=0.5), photos, tmp_path, FEW, **more)
    assert begun == [(IMAGES + 2, 0)]
    assert sum(seen) == IMAGES + 2
    model = small(mass=0.5)
    costs = [sait.macs(model, kept=counts) * images for counts, images in report.totals.kept.items()]
    assert report.gmac == pytest.approx(sum(costs) / IMAGES / 1e9, rel=0.01)  # the head is not computed
    assert set(report.rates) == {"read", "decode", "resize", "model"}
    text = "\n".join(report.lines())
    for words in ("23 images", "2 of them failed", "000-broken.jpg: no image", "of 17 on average", "the limit: "):
        assert words in text


def test_the_limit_is_the_slowest() -> None:
    def limit(workers: int, **seconds: float) -> str | None:
        prepared = Seconds(seconds["read"], seconds["decode"], seconds["resize"])
        totals = module.Totals(images=100, kept={(2,): 100}, prepared=prepared, model=seconds["model"])
        return module.Report(totals, 1.0, 0, 9, 1.0, 2.0, workers, models=1).limit

    assert limit(1, read=1, decode=2, resize=1, model=5) == "model"
    assert limit(1, read=1, decode=2, resize=1, model=3) == "decode"
    assert limit(2, read=1, decode=2, resize=1, model=3) == "model"
    assert limit(2, read=5, decode=2, resize=1, model=3) == "read"
    assert limit(0, read=1, decode=2, resize=1, model=3) == "model"


BAD = {
    "batch": ({"batch": 0}, "at least 1, got 0"),
    "part": ({"part": 0}, "at least 1"),
    "workers": ({"workers": -1}, "at least 0"),
    "actors": ({"actors": 0}, "at least 1"),
    "shard": ({"shard": (3, 2)}, "there is no shard 3/2; expected 1/2 to 2/2"),
    "max_pixels": ({"max_pixels": 10**9}, "expected 1 to 178956970"),
    "engine": ({"engine": "dask"}, "local or ray"),
}


@pytest.mark.parametrize("argument", BAD)
def test_settings_that_cannot_be(argument: str) -> None:
    changes, words = BAD[argument]
    with pytest.raises(BadInput, match=words) as error:
        Settings(**changes)
    assert error.value.argument == argument


def test_models_that_cannot_be(photos: Path, tmp_path: Path) -> None:
    def refused(model: Any, run: Any = embed, **changes: Any) -> str:
        with pytest.raises(BadInput) as error:
            run(model, photos, tmp_path, Settings(**changes))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "build it with a global_pool" in refused(small(keep=0.5, global_pool=""))
    assert "tells no classes apart" in refused(small(keep=0.5, num_classes=0), predict)
    larger = Preprocessing((64, 64), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert "cannot run at its density on 64 x 64" in refused(small(keep=0.5), preprocessing=larger)
    with pytest.raises(TypeError, match="expected a sparse model"):
        embed(pictures.timm.create_model("test_vit"), photos, tmp_path)
    with pytest.raises(BadInput, match="expected a folder outside"):
        embed(small(keep=0.5), photos, photos / "out")


def test_models_of_transformers(photos: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8, id2label={0: "cat", 1: "dog"})
    model = sait.sparsify(transformers.ViTForImageClassification(config).eval(), block=1, mass=0.5)
    with pytest.raises(BadInput, match="only timm's models know"):
        embed(model, photos, tmp_path / "features", FEW)
    expected = Preprocessing((32, 32), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    settings = Settings(batch=4, part=8, workers=0, preprocessing=expected)
    embed(model, photos, tmp_path / "features", settings)
    predict(model, photos, tmp_path / "labels", settings)
    key = "002.png"
    image = to_tensor(Image.open(photos / key), expected)[None]
    with torch.inference_mode():
        wanted = model.vit(image).last_hidden_state[0, 0]
        score, label = model(image).logits.softmax(1)[0].max(0)
    features = torch.tensor(rows(tmp_path / "features")[key]["embedding"])
    torch.testing.assert_close(features, wanted, rtol=1e-5, atol=1e-5)
    row = rows(tmp_path / "labels")[key]
    assert (row["label"], row["name"]) == (label, ("cat", "dog")[label])
    assert row["score"] == pytest.approx(score.item(), rel=1e-4)


def test_the_reference_vit(photos: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = {name: size for name, size in pictures.SMALL.items() if name != "num_classes"}
    model = sait.SaitViT(**options, num_classes=5, block=1, keep=0.5).eval()
    expected = Preprocessing((32, 32), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    embed(model, photos, tmp_path, Settings(batch=4, part=8, workers=0, preprocessing=expected))
    assert model.num_classes == 5  # the caller's model stays as it is
    image = to_tensor(Image.open(photos / "002.png"), expected)[None]
    with torch.inference_mode():
        features, starts = model.forward_features(image)
    found = torch.tensor(rows(tmp_path)["002.png"]["embedding"])
    torch.testing.assert_close(found, features[starts[0]], rtol=1e-5, atol=1e-5)
