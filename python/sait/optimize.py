"""optimize: the linear layers of a sparse model's blocks as fused products, for inference.

LayerNorm, bias, GELU, LayerScale, residual and the gather of the kept rows all happen inside the products: on a CPU of
packed weights, on a GPU of the modules' own. A block asks before each forward whether that is what its modules would
do; where it is not, they run as they are.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import torch
from timm.layers import DropPath, LayerNorm, LayerNormFp32, LayerScale, Mlp
from torch import Tensor, nn

import sait_kernels as sk
from sait.density import is_exporting, state_of
from sait.watch import HOOKS, Watch, WatchOfParameters
from sait_kernels import Selection
from sait_kernels.backend import forced_backend, refusal

NORMS = (nn.LayerNorm, LayerNorm, LayerNormFp32)
NOTHING_IN_EVAL = (nn.Identity, nn.Dropout, DropPath)
FUSED_OPS = ("norm_linear", "linear_residual")
HOLDER = "_sait_optimized"  # the attribute of a block that optimize sets


def optimize(model: Any) -> Any:
    """Fuses the linear layers of a sparse model's blocks with what surrounds them, in place; undone by deoptimize.

    Fewer passes over memory, and on a CPU faster products: benchmarks/end_to_end.py tells what that gains on a machine.
    The weights stay the parameters: state_dict and training are as before. At each forward it matters where the input
    lies:

    - On a CPU the weights are packed, which takes one more copy of them; float32 or bfloat16, no torch.compile, whose
      code fuses for itself, and no bfloat16 where the CPU has AMX, which oneDNN uses and these kernels do not. A
      parameter that was replaced or updated in place is packed anew by the next forward. What is written through
      ``weight.data`` or a NumPy array, or into a weight that was made in inference mode, torch itself does not see:
      call optimize again after that.
    - On a GPU norm_linear and linear_residual read the modules' own weights; float32 (exact, without TF32), bfloat16 or
      float16. Under torch.compile, too: who calls optimize asks for these kernels; compiled code saves the host's time
      between them. No GPU has measured this. Known is a count: five launches a block in place of ten, so it should pay
      where launches are the time, with small batches, and best in a graph (sait.graphed). Against it stands that
      norm_linear reads its rows twice for each 128 columns of its result: in DeiT-S at batch 256 a call takes 0.7 GB
      (QKV) or 0.9 GB (MLP) out of the L2 cache, and one expects some 0.9 times the speed of the model without
      optimize. It is not recommended for large batches until that is measured.

    Where a timm model's head reads prefix tokens only (class token pooling, distilled heads), its last block computes
    these alone: for them the others are keys and values. ``forward_features`` returns them all.

    This serves blocks of LayerNorm and erf-GELU in plain inference: eval mode, no gradient, no autocast, no
    torch.export. Blocks with gates, hooks or changed modules run their modules, and so does a dense model (set_density
    without arguments), which is the unpatched one bit for bit; keep=1.0 keeps all tokens in fused products.

    >>> import sait, timm
    >>> model = sait.sparsify(timm.create_model("deit_tiny_patch16_224"), block=3, keep=0.45).eval()
    >>> model = sait.optimize(model)

    Args:
        model: from sparsify, or a SaitViT.

    Returns:
        The model.

    Raises:
        TypeError: the model is not sparse.
    """
    state_of(model, "optimize")
    for block in model.blocks:
        setattr(block, HOLDER, Optimized())
    return model


def deoptimize(model: Any) -> Any:
    """Undoes optimize, if it was called; restore does so, too.

    Raises:
        TypeError: the model is not sparse.
    """
    state_of(model, "deoptimize")
    for block in model.blocks:
        vars(block).pop(HOLDER, None)
    return model


class Layers(Protocol):
    """What a block computes before and after its attention, of packed rows."""

    def qkv(self, x: Tensor) -> Tensor:
        """(T, C) -> (T, 3 A): qkv(norm1(x))."""

    def finish(self, out: Tensor, x: Tensor, selection: Selection | None) -> Tensor:
        """(S, A), (T, C) -> (S, C): x1 + ls2(mlp(norm2(x1))), where x1 is x + ls1(proj(out)) of the rows that stay."""


class PackedLayers:
    """On a CPU: products of packed weights, and of vectors in float32, as they are when this is made."""

    def __init__(self, block: Any) -> None:
        attn, mlp = block.attn, block.mlp
        self._qkv, self._qkv_features = _packed(attn.qkv), attn.qkv.weight.shape[0]
        self._norm1 = _norm_in_float(block.norm1)
        self._layers = {
            "proj": _packed(attn.proj),
            "norm": _norm_in_float(block.norm2),
            "fc1": _packed(mlp.fc1),
            "fc2": _packed(mlp.fc2),
            "hidden_features": mlp.fc1.weight.shape[0],
            "gamma1": _float(_gamma(block, "ls1")),
            "gamma2": _float(_gamma(block, "ls2")),
        }

    def qkv(self, x: Tensor) -> Tensor:
        return sk.packed_linear(x, self._qkv.packed, self._qkv_features, self._qkv.bias, norm=self._norm1)

    def finish(self, out: Tensor, x: Tensor, selection: Selection | None) -> Tensor:
        return sk.packed_block(out, x, selection=selection, **self._layers)


class FusedLayers:
    """On a GPU: products of the modules' own weights, so there is nothing to keep up to date."""

    def __init__(self, block: Any) -> None:
        attn, mlp = block.attn, block.mlp
        self._norm1, self._eps1, self._qkv = _parameters(block.norm1), block.norm1.eps, _parameters(attn.qkv)
        self._norm2, self._eps2, self._proj = _parameters(block.norm2), block.norm2.eps, _parameters(attn.proj)
        self._fc1, self._fc2 = _parameters(mlp.fc1), _parameters(mlp.fc2)
        self._gamma1, self._gamma2 = (
            _parameters(scale) if isinstance(scale, LayerScale) else {}
            for scale in (getattr(block, "ls1", None), getattr(block, "ls2", None))
        )

    def are_plain(self) -> bool:
        """Whether the parameters, too, still are what _is_plain asks for."""
        linears = (self._qkv, self._proj, self._fc1, self._fc2)
        return all([_lies_plainly(own.get("weight")) for own in linears]) and not any(
            [own.get(name) is None for own in (self._norm1, self._norm2) for name in ("weight", "bias")]
        )

    def qkv(self, x: Tensor) -> Tensor:
        norm, qkv = self._norm1, self._qkv
        return sk.norm_linear(x, norm["weight"], norm["bias"], self._eps1, qkv["weight"], qkv["bias"])

    def finish(self, out: Tensor, x: Tensor, selection: Selection | None) -> Tensor:
        norm, proj, fc1, fc2 = self._norm2, self._proj, self._fc1, self._fc2
        gamma1, gamma2 = self._gamma1.get("gamma"), self._gamma2.get("gamma")
        x = sk.linear_residual(out, proj["weight"], proj["bias"], x, selection=selection, gamma=gamma1)
        hidden = sk.norm_linear(x, norm["weight"], norm["bias"], self._eps2, fc1["weight"], fc1["bias"], gelu=True)
        return sk.linear_residual(hidden, fc2["weight"], fc2["bias"], x, gamma=gamma2)


class Optimized:
    """What optimize leaves on a block: its layers, made at the first forward and again after a change."""

    def __init__(self) -> None:
        # One assignment each, so that threads that share a model see layers and their own watch.
        self._packed: tuple[PackedLayers, Watch, WatchOfParameters] | None = None
        self._fused: tuple[FusedLayers, Watch] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Optimized, ()  # a copy of the model packs for itself

    def packed_layers(self, block: Any) -> PackedLayers | None:
        made = self._packed
        if made is None or not (made[1].unchanged(block) and made[2].unchanged()):
            made = (PackedLayers(block), Watch(block, HOLDER), WatchOfParameters(block)) if _is_plain(block) else None
            self._packed = made
        return None if made is None else made[0]

    def fused_layers(self, block: Any) -> FusedLayers | None:
        made = self._fused
        if made is None or not (made[1].unchanged(block) and made[0].are_plain()):
            made = self._fused = (FusedLayers(block), Watch(block, HOLDER)) if _is_plain(block) else None
        return None if made is None else made[0]


def optimized_layers(block: Any, x: Tensor) -> Layers | None:
    """The block's layers as fused products, if it was optimized and its modules would compute the same."""
    optimized = vars(block).get(HOLDER)
    if optimized is None or not _is_inference(x):
        return None
    forced = forced_backend()
    if forced == "cpu" or (forced is None and x.device.type == "cpu"):
        return optimized.packed_layers(block) if _packs(x, block.attn.qkv.weight) else None
    if not _has_kernels(x, forced):
        return None
    if torch.compiler.is_compiling():  # its guards are the watch
        return FusedLayers(block) if _is_plain(block) else None
    return optimized.fused_layers(block)


def _packs(x: Tensor, weight: Tensor) -> bool:
    """Compiled code fuses for itself. Where a CPU multiplies bfloat16 in tiles (AMX), oneDNN does, and we do not."""
    served = x.device.type == weight.device.type == "cpu" and x.dtype == weight.dtype
    served = served and not torch.compiler.is_compiling()
    return served and (x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and not _has_amx()))


@functools.cache
def _has_amx() -> bool:
    return torch.cpu._is_amx_tile_supported()


def _has_kernels(x: Tensor, forced: str | None) -> bool:
    return all([_is_served(op, x, forced) for op in FUSED_OPS])


def _is_served(op: str, x: Tensor, forced: str | None) -> bool:
    return any(forced in (None, name) and refusal(op, name, x) is None for name in ("triton", "cuda"))


def _is_inference(x: Tensor) -> bool:
    """And no export: its program is for other machines and passes, which know a linear layer and not these ops."""
    return not (torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type) or is_exporting())


def _is_linear(module: Any) -> bool:
    """Its weight lies as the ops read it, and is what it looks like: a quantised one is of another class."""
    return type(module) is nn.Linear and _lies_plainly(module.weight)


def _lies_plainly(weight: Any) -> bool:
    return type(weight) is nn.Parameter and weight.stride(1) == 1


def _is_plain(block: Any) -> bool:
    """LayerNorm, attention, LayerNorm, erf-GELU MLP and nothing else that does anything in eval mode."""
    attn, mlp = block.attn, block.mlp
    linears = (attn.qkv, attn.proj, getattr(mlp, "fc1", None), getattr(mlp, "fc2", None))
    return (
        all(map(_is_linear, linears))
        and getattr(attn, "gate", None) is None
        and all(type(norm) in NORMS and _is_affine(norm) for norm in (block.norm1, block.norm2))
        and all(type(getattr(block, name, None)) in (nn.Identity, LayerScale, type(None)) for name in ("ls1", "ls2"))
        and _is_plain_mlp(mlp)
        and all(type(part) in NOTHING_IN_EVAL for part in _drops(block))
        and _is_untouched(block)
    )


def _is_affine(norm: Any) -> bool:
    return norm.weight is not None and norm.bias is not None and norm.eps > 0


def _is_plain_mlp(mlp: Any) -> bool:
    """fc1 -> erf-GELU -> fc2: timm's, or SaitViT's."""
    plain = type(mlp) is Mlp and isinstance(mlp.norm, nn.Identity)
    plain = plain or (type(mlp) is nn.Sequential and list(mlp._modules) == ["fc1", "act", "fc2"])
    return plain and type(mlp.act) is nn.GELU and mlp.act.approximate == "none"


def _drops(block: Any) -> list[nn.Module]:
    attn, mlp = block.attn, block.mlp
    names = ((attn, "proj_drop"), (block, "drop_path1"), (block, "drop_path2"), (mlp, "drop1"), (mlp, "drop2"))
    return [getattr(parent, name) for parent, name in names if hasattr(parent, name)]


def _is_untouched(module: Any) -> bool:
    """In eval mode, without hooks and without a forward of the instance's own, and so are all its parts."""
    own = vars(module)
    if own["training"] or "forward" in own or any(own[hooks] for hooks in HOOKS):
        return False
    return all(part is None or _is_untouched(part) for part in own["_modules"].values())


def _parameters(module: Any) -> dict[str, Any]:
    """The module's own dictionary of them."""
    return vars(module)["_parameters"]


def _gamma(block: Any, name: str) -> Tensor | None:
    scale: Any = getattr(block, name, None)
    return scale.gamma if isinstance(scale, LayerScale) else None


def _packed(module: nn.Linear) -> sk.PackedLayer:
    return sk.PackedLayer(sk.pack_linear(module.weight.detach()), _float(module.bias))


def _norm_in_float(module: Any) -> tuple[Tensor, Tensor, float]:
    return module.weight.detach().float(), module.bias.detach().float(), module.eps


def _float(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.detach().float()
