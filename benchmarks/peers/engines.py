"""The dense model, and the same pruning in plain torch, in engines that convert a model once and then run it.

Both are converted for any batch size, since a user does not know it beforehand either.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from sait import cost
from sait.bench.peers import Made, Peer, Setting
from sait.bench.plain import PlainPruning
from sait.exports import formats
from torch import Tensor, nn


class EngineModule(nn.Module):
    """A module in an engine, on the CPU, with torch's number of threads.

    Args:
        module: images (B, 3, height, width) -> logits.
        images: examples, in the dtype to compute in.
        streams: threads that will call this at once; each call then has torch's number of threads.

    Raises:
        RuntimeError: the engine is not installed, the images are on a GPU, or it does not compute in their dtype.
    """

    package: str
    dtypes: tuple[torch.dtype, ...]

    def __init__(self, module: nn.Module, images: Tensor, streams: int = 1) -> None:
        super().__init__()
        if images.device.type != "cpu":
            raise RuntimeError("measured on a CPU only")
        try:
            found = __import__(self.package)
        except ImportError as error:
            raise RuntimeError(f"not installed: pip install {self.package}") from error
        if images.dtype not in self.dtypes:
            wanted = " or ".join({torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype] for dtype in self.dtypes)
            raise RuntimeError(f"expected {wanted}, got {images.dtype}")
        self.version, self.streams = found.__version__.partition("-")[0], streams
        # Outside inference mode: a tracer needs tensors that autograd could follow. It warns of values that it takes
        # for constants; these are sizes.
        with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings(action="ignore"):
            self.convert(copy.deepcopy(module).float().eval(), images.float().clone(), images.dtype)

    def convert(self, module: nn.Module, example: Tensor, dtype: torch.dtype) -> None:
        """Makes the model that forward runs, computing in ``dtype``."""
        raise NotImplementedError


class OpenVino(EngineModule):
    package, dtypes = "openvino", (torch.bfloat16, torch.float32)

    def convert(self, module: nn.Module, example: Tensor, dtype: torch.dtype) -> None:
        import openvino

        options = {
            "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
            "INFERENCE_NUM_THREADS": self.streams * torch.get_num_threads(),
            "NUM_STREAMS": self.streams,
            "PERFORMANCE_HINT": "LATENCY",
        }
        images, *others = self.inputs(example)
        shapes = [[-1, *example.shape[1:]], *(list(other.shape) for other in others)]
        traced = openvino.convert_model(module, example_input=(images, *others), input=shapes)
        self.compiled, self.of_thread = formats.openvino_core().compile_model(traced, "CPU", options), threading.local()

    def inputs(self, example: Tensor) -> tuple[Tensor, ...]:
        """The module's inputs, images first."""
        return (example,)

    def forward(self, images: Tensor, *others: Tensor) -> Tensor:
        if not hasattr(self.of_thread, "request"):  # a request handles one call at a time
            self.of_thread.request = self.compiled.create_infer_request()
        inputs = [images.float().numpy(), *(other.numpy() for other in others)]
        return torch.from_numpy(self.of_thread.request.infer(inputs, share_inputs=True)[0])


class OnnxRuntime(EngineModule):
    package, dtypes = "onnxruntime", (torch.float32,)  # its CPU kernels of bfloat16 convert to float32

    def convert(self, module: nn.Module, example: Tensor, dtype: torch.dtype) -> None:
        import onnxruntime

        program = io.BytesIO()
        names = {"input_names": ["images"], "dynamic_shapes": {"images": {0: torch.export.Dim("batch")}}}
        for talker in ("torch.onnx", "onnxscript"):
            logging.getLogger(talker).setLevel(logging.ERROR)
        with contextlib.redirect_stdout(io.StringIO()):
            torch.onnx.export(Named(module), (example,), dynamo=True, **names).save(program)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(program.getvalue(), options, providers=["CPUExecutionProvider"])

    def forward(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self.session.run(None, {"images": images.numpy()})[0])


class Named(nn.Module):
    """A module whose argument has the name that the engine uses."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Tensor:
        return self.module(images)


def _dense(engine: type[EngineModule]) -> Callable[[Setting], Made]:
    def made(setting: Setting) -> Made:
        module = engine(setting.vit, setting.images, setting.streams)
        plan = f"dense, {engine.package} {module.version}"
        return Made(module, plan, cost.plan_rows(setting.vit, None), counted=False)

    return made


def _pruned(engine: type[EngineModule]) -> Callable[[Setting], Made]:
    def made(setting: Setting) -> Made:
        plain = PlainPruning(setting.vit, setting.block, setting.keep)
        module: Any = engine(plain, setting.images, setting.streams)
        rows = cost.plan_rows(setting.vit, setting.plan)
        at = rows[setting.block]
        rows[setting.block] = at._replace(queries=at.entering)  # attention of all rows
        plan = f"block={setting.block}, keep={setting.keep}, score=cls, {engine.package} {module.version}"
        return Made(module, plan, rows, counted=False)

    return made


PEERS = {
    "openvino": Peer("OpenVINO", "dense", _dense(OpenVino), device="cpu"),
    "onnxruntime": Peer("ONNX Runtime", "dense", _dense(OnnxRuntime), device="cpu"),
    "openvino-pruned": Peer(
        *("OpenVINO, plain pruning", "pruned", _pruned(OpenVino), "openvino"), device="cpu", same_pruning=True
    ),
    "onnxruntime-pruned": Peer(
        *("ONNX Runtime, plain pruning", "pruned", _pruned(OnnxRuntime), "onnxruntime"), device="cpu", same_pruning=True
    ),
}
