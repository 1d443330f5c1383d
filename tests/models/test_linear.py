"""The fused linear layers: the same numbers, and only where nobody changed what a layer does."""

from __future__ import annotations

import sait
import timm
import torch
from sait.execution.linear import linear, mlp
from sait.families.timm_vit import TIMM_VIT
from timm.layers import Mlp
from torch import Tensor, nn


@torch.inference_mode()
def test_same_numbers() -> None:
    torch.manual_seed(0)
    layers, x = Mlp(48, 96).eval(), torch.randn(2, 7, 48)
    exact = Mlp(48, 96).eval().double()
    exact.load_state_dict(layers.state_dict())
    # 96 products of a size below 1 and a few roundings: 96 eps is generous, a missing bias or GELU far outside
    bound = 96 * torch.finfo(torch.float32).eps
    assert (mlp(layers, x, TIMM_VIT) - exact(x.double())).abs().max() < bound
    assert (linear(layers.fc1, x) - exact.fc1(x.double())).abs().max() < bound


@torch.inference_mode()
def test_changed_layers_run_as_they_are() -> None:
    x = torch.randn(2, 7, 48)

    class Doubled(nn.Parameter):
        """A weight that is not what it looks like, as quantised ones are."""

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None) -> Tensor:
            with torch._C.DisableTorchFunctionSubclass():
                doubled = func is torch.nn.functional.linear
                args = tuple(2 * a.as_subclass(Tensor) if doubled and isinstance(a, cls) else a for a in args)
                return func(*args, **(kwargs or {}))

    own, hooked, subclass = nn.Linear(48, 96), nn.Linear(48, 96), nn.Linear(48, 96, bias=False)
    own.forward = lambda x: x + 1  # as adapters patch a layer
    hooked.register_forward_hook(lambda module, args, output: output + 1)
    expected = 2 * subclass(x)
    subclass.weight = Doubled(subclass.weight.detach())
    assert torch.equal(linear(own, x), x + 1)
    assert torch.equal(linear(hooked, x), hooked(x))
    torch.testing.assert_close(linear(subclass, x), expected)

    layers = Mlp(48, 96).eval()
    layers.act.forward = lambda x: 0 * x
    assert torch.equal(mlp(layers, x, TIMM_VIT), layers(x))


@torch.inference_mode()
def test_autocast_decides_the_type() -> None:
    layers, x = Mlp(48, 96).eval(), torch.randn(2, 7, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear(layers.fc1, x), layers.fc1(x))
        assert torch.equal(mlp(layers, x, TIMM_VIT), layers(x))
    assert linear(layers.fc1, x).dtype == torch.float32


@torch.inference_mode()
def test_empty_batch() -> None:
    model = timm.create_model("deit_tiny_patch16_224", depth=2, img_size=32).eval()
    sait.sparsify(model, block=0, keep=0.5)
    assert model(torch.randn(0, 3, 32, 32)).shape == (0, 1000)
