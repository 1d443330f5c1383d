"""sait.export: what leaves computes what the model does, in every format, at any batch, or is refused with the cure."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import sait
import test_eva as eva
import timm
import torch
import zoo
from helpers import run_python
from sait import Plan, Stage, methods
from sait.exports import formats, plain_ops
from sait.exports.export import export
from sait.methods import ColumnAttention, RandomScore, TopK
from tiers import full_only
from torch import Tensor

SUFFIXES = tuple(formats.FORMATS)
PLANS = {
    "one": Plan([Stage(1, 0.45)]),
    "two": Plan([Stage(0, 9), Stage(2, ColumnAttention(), TopK(0.6))]),
    "values": Plan([Stage(1, 0.5)], score="cls_value"),
    "before": Plan([Stage(1, ColumnAttention(), TopK(0.5)), Stage(2, 0.5)]),
    "everything": Plan([Stage(1, 1.0)]),
}
# Of the largest result. Both sides add up the same products in float32, each in its own order.
APART = 1e-5


def need(suffix: str) -> None:
    """The oldest stack has no other engines."""
    for package in (*formats.FORMATS[suffix].writes_with, *formats.FORMATS[suffix].reads_with):
        pytest.importorskip(package)


def results(model: Any, images: Tensor) -> list[Tensor]:
    found = model(images)
    return [found] if isinstance(found, Tensor) else [value for value in found.values() if isinstance(value, Tensor)]


def assert_is_the_model(path: Path, model: Any, images: Tensor, batches: tuple[int, ...] = (1, 2, 5)) -> None:
    run = formats.FORMATS[path.suffix].read(path)
    for batch in batches:
        some = images[:batch]
        for got, want in zip(run(some), results(model, some), strict=True):
            assert got.shape == want.shape
            torch.testing.assert_close(got, want, rtol=0, atol=APART * want.abs().max().item())


@full_only(lambda suffix, name: suffix in (".onnx", ".xml") and name not in ("two", "values"))  # seconds of conversion
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("suffix", SUFFIXES)
@torch.no_grad()
def test_every_format_at_any_batch(suffix: str, name: str, tmp_path: Path) -> None:
    need(suffix)
    model, x = sait.sparsify(zoo.build("registers"), PLANS[name]), zoo.images("registers", 5)
    path = tmp_path / f"model{suffix}"
    written = sait.export(model, path, x[:3], check=False)
    assert written == (path, formats.FORMATS[suffix].label, ("logits",), {})
    assert_is_the_model(path, model, x)
    assert {file.suffix for file in tmp_path.iterdir()} <= {suffix, ".bin"}, "nothing else is left behind"


@full_only(lambda suffix, name: suffix == ".xml" or (suffix == ".onnx" and name != "dinov3"))
@pytest.mark.parametrize("name", ["dinov3", "rope_mixed", "eva02_clip"])
@pytest.mark.parametrize("suffix", SUFFIXES)
@torch.no_grad()
def test_positions_go_with_the_rows(suffix: str, name: str, tmp_path: Path) -> None:
    need(suffix)
    model, x = sait.sparsify(eva.build(name), Plan([Stage(0, 0.6), Stage(2, 0.5)])), eva.images(name, 5)
    sait.export(model, tmp_path / f"model{suffix}", x[:2], check=False)
    assert_is_the_model(tmp_path / f"model{suffix}", model, x)


@full_only(lambda suffix, name: suffix == ".xml" or (suffix == ".onnx" and name != "vit_encoder"))
@pytest.mark.parametrize("name", ["vit_encoder", "dinov2", "dinov3"])
@pytest.mark.parametrize("suffix", SUFFIXES)
@torch.no_grad()
def test_models_of_transformers(suffix: str, name: str, tmp_path: Path) -> None:
    need(suffix)
    import test_hf as hf

    model, x = sait.sparsify(hf.build(name), block=1, keep=0.5), hf.images(5)
    written = sait.export(model, tmp_path / f"model{suffix}", x[:2], check=False)
    assert written.outputs == tuple(key for key, value in model(x[:2]).items() if value is not None)
    assert_is_the_model(tmp_path / f"model{suffix}", model, x)


@pytest.mark.parametrize("name", ["siglip", "gap", "layerscale_qknorm", "distilled", "gated", "swiglu"])
@torch.no_grad()
def test_other_models_and_densities(name: str, tmp_path: Path) -> None:
    """Dense, too; and one model at several densities, which no export changes."""
    model, x = sait.sparsify(zoo.build(name), zoo.plans(name)[0]), zoo.images(name, 5)
    for keep in (0.3, 1.0, None):
        sait.set_density(model, keep=keep)
        want = model(x)
        path = tmp_path / f"{keep}.pt2"
        assert set(sait.export(model, path, x[:2]).errors) == {2, 3}
        assert torch.equal(model(x), want)
        assert_is_the_model(path, model, x)


@torch.no_grad()
def test_the_reference_vit_and_an_optimized_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {key: zoo.SMALL[key] for key in ("embed_dim", "num_heads", "depth", "num_classes", "img_size")}
    model, x = sait.SaitViT(**sizes, block=1, keep=0.5).eval(), zoo.images("vit", 5)
    sait.export(model, tmp_path / "plain.pt2", x[:2])
    assert_is_the_model(tmp_path / "plain.pt2", model, x)
    sait.export(sait.optimize(model), tmp_path / "optimized.pt2", x[:2])
    assert_is_the_model(tmp_path / "optimized.pt2", model, x)


@torch.no_grad()
def test_a_scorer_that_fixes_the_batch(tmp_path: Path) -> None:
    class OfItsExample:
        def __call__(self, seen: sait.Seen) -> Tensor:
            return seen.x.float().norm(dim=1)[: len(seen.x)]

    model = sait.sparsify(zoo.build("vit"), Plan([Stage(1, OfItsExample(), TopK(0.5))]))
    with pytest.raises(RuntimeError, match=r"export: model: torch\.export does not take it: .* or pass dynamic=False"):
        sait.export(model, tmp_path / "model.pt2", zoo.images("vit", 2))
    assert set(sait.export(model, tmp_path / "model.pt2", zoo.images("vit", 2), dynamic=False).errors) == {2}


@pytest.mark.parametrize("plan", [methods.evit(0.7), methods.tome(3)], ids=["evit", "tome"])
@torch.no_grad()
def test_methods_that_merge(plan: Plan, tmp_path: Path) -> None:
    model, x = sait.sparsify(zoo.build("vit"), plan), zoo.images("vit", 5)
    sait.export(model, tmp_path / "model.pt2", x[:2])
    assert_is_the_model(tmp_path / "model.pt2", model, x)
    need(".onnx")
    (tmp_path / "model.onnx").write_text("of yesterday")
    with pytest.raises(RuntimeError, match=r"export: ONNX has no form of aten\..* others, as a \.pt2"):
        sait.export(model, tmp_path / "model.onnx", x[:2])
    assert (tmp_path / "model.onnx").read_text() == "of yesterday"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_other_types(dtype: torch.dtype, tmp_path: Path) -> None:
    model = sait.sparsify(zoo.build("vit").to(dtype), block=1, keep=0.5)
    written = sait.export(model, tmp_path / "model.pt2", zoo.images("vit", 2).to(dtype))
    assert set(written.errors) == {2, 3}


@torch.no_grad()
def test_a_file_that_computes_something_else_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {**plain_ops.decompositions(), torch.ops.sait.prune_attention.default: worst_stay}
    monkeypatch.setattr("sait.exports.export.decompositions", lambda: broken)
    model, x = sait.sparsify(zoo.build("vit"), block=1, keep=0.5), zoo.images("vit", 2)
    with pytest.raises(RuntimeError, match="the file's results differ from the model's"):
        sait.export(model, tmp_path / "model.pt2", x)
    assert not list(tmp_path.iterdir())


def worst_stay(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, n: int, rate: float, *_: Any) -> Any:
    scores = -plain_ops.score_tokens(q, k, v, cu, n, "cls", 1, None)
    rows, kept = plain_ops.select_topk(scores, cu, n, rate, None, 1)
    return plain_ops.compact_attention(q, k, v, cu, n, rows, kept), rows, kept


@torch.no_grad()
def test_our_own_ops_leave_too(tmp_path: Path) -> None:
    """In a program for a process that has the package: then images may decide, if sizes are static."""
    model, x = sait.sparsify(zoo.build("vit"), block=1, mass=0.8, static=True, max_keep=12), zoo.images("vit", 5)
    path = tmp_path / "kernels.pt2"
    sait.export(model, path, x[:2], kernels=True)
    assert_is_the_model(path, model, x)
    torch.save((x, model(x)), tmp_path / "want")
    program = "import torch, sait_kernels\n"
    program += f"x, want = torch.load({str(tmp_path / 'want')!r})\n"
    program += f"got = torch.export.load({str(path)!r}).module()(x)\n"
    program += "torch.testing.assert_close(got, want)\n"
    done = run_python("-c", program)
    assert done.returncode == 0, done.stderr


@full_only(lambda kernels: not kernels)  # half a minute of a C++ compiler
@pytest.mark.parametrize("kernels", [False, True])
@torch.no_grad()
def test_machine_code(kernels: bool, tmp_path: Path) -> None:
    model, x = zoo.build("vit"), zoo.images("vit", 5)
    model.blocks = model.blocks[:2]  # each block costs seconds of a C++ compiler
    sait.sparsify(model, block=0, keep=0.5)
    written = sait.export(model, tmp_path / "model.pt2", x[:2], compiled=True, kernels=kernels)
    assert written.format == "AOTInductor"
    run = formats.COMPILED.read(tmp_path / "model.pt2")
    for batch in (1, 5):
        (got,), want = run(x[:batch]), model(x[:batch])
        torch.testing.assert_close(got, want, rtol=0, atol=APART * want.abs().max().item())


@torch.no_grad()
def test_names_that_people_expect(tmp_path: Path) -> None:
    onnx, _ = pytest.importorskip("onnx"), pytest.importorskip("openvino")
    need(".onnx")
    model, x = sait.sparsify(zoo.build("vit"), block=1, keep=0.5), zoo.images("vit", 2)
    sait.export(model, tmp_path / "model.onnx", x)
    document = onnx.load(str(tmp_path / "model.onnx"))
    onnx.checker.check_model(document)
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*document.graph.input, *document.graph.output)
    }
    assert shapes == {"images": ["batch", 3, 80, 80], "logits": ["batch", 24]}
    assert document.opset_import[0].version >= 18
    (entry,) = document.metadata_props
    assert entry.key == "sait"
    assert json.loads(entry.value)["plan"] == sait.density(model).name
    ops = {node.op_type for node in document.graph.node}
    assert not ops & {"ScatterND", "ScatterElements", "Loop", "If", "NonZero"}, "TensorRT has no sure way for these"

    sait.export(model, tmp_path / "model.xml", x)
    read = formats.openvino_core().read_model(tmp_path / "model.xml")
    assert [port.get_any_name() for port in (*read.inputs, *read.outputs)] == ["images", "logits"]
    assert str(read.inputs[0].get_partial_shape()) == "[?,3,80,80]"
    assert json.loads(read.get_rt_info("sait").astype(str))["model"] == type(model).__name__


def test_a_process_outlives_its_engines(tmp_path: Path) -> None:
    """Signals find their stack after engines that ended in the order in which they began; see formats.openvino_core."""
    need(".xml")
    model, x = sait.sparsify(zoo.build("vit"), block=1, keep=0.5), zoo.images("vit", 2)
    sait.export(model, tmp_path / "model.xml", x)
    program = f"""
import faulthandler, signal, subprocess, sys
from pathlib import Path
from sait.exports import formats
faulthandler.enable()  # it has a signal stack of its own, as that of a test
signal.signal(signal.SIGCHLD, lambda number, frame: print("handled"))
engines = [formats.FORMATS[".xml"].read(Path({str(tmp_path / "model.xml")!r})) for _ in range(2)]
while engines:
    del engines[0]
subprocess.run([sys.executable, "-c", ""], check=True)
print("alive")
"""
    done = run_python("-c", program)
    assert done.returncode == 0, done.stderr
    assert "handled" in done.stdout
    assert done.stdout.endswith("alive\n")


def test_no_engine_has_a_core_of_its_own() -> None:
    root, call = Path(__file__).parents[2], "openvino." + "Core("
    folders = ("python", "benchmarks", "tests", "tools", "experiments")
    sources = [path for folder in folders for path in (root / folder).rglob("*.py")]
    assert [path.name for path in sources if call in path.read_text(encoding="utf-8")] == ["formats.py"]


@torch.no_grad()
def test_a_fixed_batch_and_features(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = sait.sparsify(
        timm.create_model("vit_tiny_patch16_224", **{**zoo.SMALL, "num_classes": 0}).eval(), block=1, keep=0.5
    )
    x = zoo.images("vit", 2)
    assert sait.export(model, tmp_path / "any.pt2", x[:1]).outputs == ("features",)
    assert set(sait.export(model, tmp_path / "one.pt2", x[:1], dynamic=False).errors) == {1}
    run = formats.FORMATS[".pt2"].read(tmp_path / "one.pt2")
    with pytest.raises(Exception, match=r"batch|shape|size|2"):
        run(x)


@torch.no_grad()
def test_an_adaptive_share_is_refused_with_the_nearest(tmp_path: Path) -> None:
    x = zoo.images("vit", 4)
    model = sait.sparsify(zoo.build("vit"), block=1, mass=0.8)
    with pytest.raises(
        ValueError, match=r"These images keep as many by sait.set_density\(model, keep=0\.\d+\)"
    ) as error:
        sait.export(model, tmp_path / "model.onnx", x)
    share = float(str(error.value).split("keep=")[1].rstrip(")."))
    model(x)
    mean = (int(sait.selections(model)[0].cu_seqlens[-1]) / 4 - 1) / 25
    assert abs(share - mean) <= 0.005 + 1e-9
    with pytest.raises(ValueError, match=r"sizes\. Make them static: .*; or fixed: sait\.set_density"):
        sait.export(model, tmp_path / "model.pt2", x, kernels=True)
    sait.set_density(model, mass=0.8, static=True, max_keep=12)
    with pytest.raises(ValueError, match="a program of plain ops keeps as many"):
        sait.export(model, tmp_path / "model.pt2", x)
    two = sait.sparsify(zoo.build("vit"), Plan([Stage(0, mass=0.8), Stage(2, mass=0.8)]))
    with pytest.raises(
        ValueError, match=r"sait.set_density\(model, Plan\(\[Stage\(0, 0\.\d+\), Stage\(2, 0\.\d+\)\]\)\)"
    ):
        sait.export(two, tmp_path / "model.onnx", x)


@torch.no_grad()
def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = sait.sparsify(zoo.build("vit"), block=1, keep=0.5), zoo.images("vit", 2)
    with pytest.raises(TypeError, match=r"export: model: expected a sparse model, got VisionTransformer"):
        sait.export(zoo.build("vit"), tmp_path / "model.onnx", x)
    with pytest.raises(ValueError, match=r"export: path: expected a name that ends in one of \.onnx \(ONNX\)"):
        sait.export(model, tmp_path / "model.engine", x)
    with pytest.raises(ValueError, match=r"export: kernels: expected a \.pt2 for it, got 'model\.onnx'"):
        sait.export(model, tmp_path / "model.onnx", x, kernels=True)
    with pytest.raises(ValueError, match=r"export: compiled: expected a \.pt2"):
        sait.export(model, tmp_path / "model.ts", x, compiled=True)
    with pytest.raises(ValueError, match=r"export: images: expected \(B, 3, height, width\), got \(3, 80, 80\)"):
        sait.export(model, tmp_path / "model.pt2", x[0])
    with pytest.raises(FileNotFoundError, match="expected an existing folder"):
        sait.export(model, tmp_path / "nowhere" / "model.pt2", x)
    with pytest.raises(ValueError, match=r"expected eval mode"):
        sait.export(model.train(), tmp_path / "model.pt2", x)
    noise = sait.sparsify(zoo.build("vit"), Plan([Stage(1, RandomScore(), TopK(0.5))]))
    with pytest.raises(ValueError, match="got noise"):
        sait.export(noise, tmp_path / "model.pt2", x)
    need(".onnx")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name))
    with pytest.raises(ImportError, match="export: ONNX needs onnxscript: pip install onnxscript"):
        sait.export(model.eval(), tmp_path / "model.onnx", x)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else found(name))
    assert export(model, tmp_path / "model.onnx", x).errors == {}, "an engine that is not there compares nothing"
