"""How an exported program becomes a file of each format, and how that file is run again."""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

KEY = "sait"  # of the metadata in a file, a JSON document
INPUT = "images"
BATCH = "batch"


class Content(NamedTuple):
    """What goes into a file."""

    program: ExportedProgram  # of one input, and of a tensor or a tuple of tensors
    images: Tensor  # an example
    outputs: tuple[str, ...]
    dynamic: bool  # whether the batch is open
    metadata: Mapping[str, Any]


Run = Callable[[Tensor], "list[Tensor]"]


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        label: what tables call it.
        write: into a file, and perhaps others beside it.
        read: the file -> images -> results, on the host.
        writes_with, reads_with: packages that it takes, beside torch.
        keeps_ops: whether it can hold the ops of sait_kernels.
    """

    label: str
    write: Callable[[Content, Path], None]
    read: Callable[[Path], Run]
    writes_with: tuple[str, ...] = ()
    reads_with: tuple[str, ...] = ()
    keeps_ops: bool = False


def _write_onnx(content: Content, path: Path) -> None:
    program = torch.onnx.export(
        content.program,
        (content.images,),
        dynamo=True,
        input_names=[INPUT],
        output_names=list(content.outputs),
        verbose=False,
    )
    assert program is not None
    graph = program.model.graph
    if content.dynamic:
        for value in (*graph.inputs, *graph.outputs):
            assert value.shape is not None
            value.shape[0] = BATCH
    program.model.metadata_props[KEY] = json.dumps(content.metadata)
    program.save(str(path))


def _read_onnx(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(y) for y in session.run(None, {INPUT: images.numpy()})]


def _write_openvino(content: Content, path: Path) -> None:
    import openvino

    model = openvino.convert_model(content.program)
    (images,) = model.inputs
    images.get_tensor().set_names({INPUT})
    for output, name in zip(model.outputs, content.outputs, strict=True):
        output.get_tensor().set_names({name})
    batch = -1 if content.dynamic else content.images.shape[0]
    model.reshape({images: [batch, *content.images.shape[1:]]})
    model.set_rt_info(json.dumps(content.metadata), KEY)
    openvino.save_model(model, path, compress_to_fp16=False)


@functools.cache
def openvino_core() -> Any:
    """OpenVINO's Core, one for the life of a process.

    Each Core that compiles for the CPU replaces the main thread's signal stack by its own, and puts the one before it
    back when it ends. If two of them end in the order in which they began, the stack that is left in place has been
    freed, and the next signal with a handler ends the process: seen with OpenVINO 2026.4 and a DataLoader, which
    handles the signal of a child that ended.
    """
    import openvino

    return openvino.Core()


def _read_openvino(path: Path) -> Run:
    # In the model's own precision: by default a CPU with bfloat16 GEMMs runs float32 models in bfloat16.
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino_core().compile_model(path, "CPU", options)
    return lambda images: [torch.from_numpy(y.copy()) for y in compiled(images.numpy()).values()]


def _write_torchscript(content: Content, path: Path) -> None:
    graph: Any = content.program.module()
    for node in graph.graph.nodes:
        _read_sizes_in_trace(node)
    graph.recompile()
    traced = torch.jit.trace(graph, (content.images,), check_trace=False)
    torch.jit.save(traced, str(path), _extra_files={KEY: json.dumps(content.metadata)})


def _read_sizes_in_trace(node: torch.fx.Node) -> None:
    """Sizes that depend on the batch: the ops of a program take numbers, of which a trace sees the value only; torch's
    functions and methods take what the trace has in their place."""
    if node.op != "call_function" or node.target is operator.getitem:
        return
    if node.target is torch.ops.aten.sym_size.int:
        node.op, node.target = "call_method", "size"
        return
    arguments = [leaf for leaf in tree_leaves((node.args, node.kwargs)) if isinstance(leaf, torch.fx.Node)]
    if isinstance(node.target, torch._ops.OpOverload) and any(
        isinstance(argument.meta.get("val"), torch.SymInt) for argument in arguments
    ):
        name = node.target.overloadpacket.__name__
        first = node.args[0].meta.get("val") if isinstance(node.args[0], torch.fx.Node) else None
        if isinstance(first, Tensor) and hasattr(Tensor, name):
            node.op, node.target = "call_method", name
        else:
            node.target = getattr(torch, name)


def _read_torchscript(path: Path) -> Run:
    loaded = torch.jit.load(str(path), map_location="cpu")
    return lambda images: _listed(loaded(images))


def _write_program(content: Content, path: Path) -> None:
    torch.export.save(content.program, path, extra_files={KEY: json.dumps(content.metadata)})


def _read_program(path: Path) -> Run:
    module = torch.export.load(path).module()
    return lambda images: _listed(module(images))


def _write_compiled(content: Content, path: Path) -> None:
    metadata = {f"{KEY}.{key}": json.dumps(value) for key, value in content.metadata.items()}
    options = {"aot_inductor.metadata": metadata}
    torch._inductor.aoti_compile_and_package(content.program, package_path=str(path), inductor_configs=options)


def _read_compiled(path: Path) -> Run:
    loaded: Any = torch._inductor.aoti_load_package(str(path))
    return lambda images: _listed(loaded(images))


def _listed(results: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


FORMATS: dict[str, Format] = {
    ".onnx": Format("ONNX", _write_onnx, _read_onnx, ("onnx", "onnxscript"), ("onnxruntime",)),
    ".xml": Format("OpenVINO", _write_openvino, _read_openvino, ("openvino",), ("openvino",)),
    ".pt2": Format("torch.export", _write_program, _read_program, keeps_ops=True),
    ".ts": Format("TorchScript", _write_torchscript, _read_torchscript),
}
COMPILED = Format("AOTInductor", _write_compiled, _read_compiled, keeps_ops=True)  # a .pt2, too
