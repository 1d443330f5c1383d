"""The dense model in OpenVINO."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from sait import cost
from sait.bench.peers import Made, Peer, Setting
from torch import Tensor, nn


class OpenVino(nn.Module):
    """The dense model in OpenVINO, on the CPU, with torch's number of threads.

    Raises:
        RuntimeError: openvino is not installed, or the images are on a GPU.
    """

    def __init__(self, vit: Any, images: Tensor) -> None:
        super().__init__()
        if images.device.type != "cpu":
            raise RuntimeError("measured on a CPU only")
        try:
            import openvino
        except ImportError as error:
            raise RuntimeError("not installed: pip install openvino") from error
        hints = {torch.bfloat16: "bf16", torch.float32: "f32"}
        if images.dtype not in hints:
            raise RuntimeError(f"expected bf16 or fp32, got {images.dtype}")
        options = {
            "INFERENCE_PRECISION_HINT": hints[images.dtype],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        # Outside inference mode: the tracer wants tensors that autograd could follow. What it warns of, values that it
        # takes for constants, are sizes.
        with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings(action="ignore"):
            example, whole = images.float().clone(), copy.deepcopy(vit).float()
            traced = openvino.convert_model(whole, example_input=example, input=list(images.shape))
        self.version = openvino.__version__.partition("-")[0]
        self.request = openvino.Core().compile_model(traced, "CPU", options).create_infer_request()

    def forward(self, images: Tensor) -> Tensor:
        answers = self.request.infer([images.float().numpy()], share_inputs=True)
        return torch.from_numpy(answers[0])


def _openvino(setting: Setting) -> Made:
    module = OpenVino(setting.vit, setting.images)
    return Made(module, f"dense, openvino {module.version}", cost.plan_rows(setting.vit, None), counted=False)


PEERS = {"openvino": Peer("OpenVINO", "dense", _openvino, device="cpu")}
