"""optimize: the linear layers of a sparse model's blocks as fused GEMMs, for inference.

LayerNorm, bias, GELU, LayerScale, residual and the gather of the kept rows are all fused into the GEMMs: on a CPU those
of packed weights, on a GPU those of the modules' own weights. Before each forward a block asks whether that is what its
modules would compute; if not, the modules run as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import sait_kernels as sk
from sait.execution.block import Block
from sait.execution.modules import (
    activation_of,
    gamma_of,
    has_no_norm,
    is_layer_norm,
    lies_in_rows,
    projections,
    why_no_plain_block,
)
from sait.execution.plain import PlainBlock
from sait.execution.watch import Watch, WatchOfParameters
from sait.families.base import BlockView, Family, FeedForward, LinearParameters
from sait.methods.base import After
from sait.methods.fusion import Attended
from sait.state import is_exporting, sparse_family, state_of
from sait.tokens import Tokens
from sait_kernels import Selection
from sait_kernels.backend import forced_backend, in_forward_mode, refusal

FUSED_OPS = ("norm_linear", "linear_residual")
HOLDER = "_sait_optimized"  # the attribute of a block that optimize sets


def optimize(model: Any) -> Any:
    """Fuses the linear layers of a sparse model's blocks with what surrounds them, in place; undone by deoptimize.

    Fewer passes over memory, and on a CPU faster GEMMs: benchmarks/end_to_end.py tells what that gains on a machine.
    The weights stay the parameters: state_dict and training are as before. At each forward it matters where the input
    lies:

    - On a CPU the weights are packed, which takes one more copy of them, and all blocks are one op, sk.packed_encoder,
      where nothing has to be done between them: sait.explain says whether. float32 or bfloat16, no torch.compile, whose
      code fuses for itself, and no bfloat16 where the CPU has AMX, which oneDNN uses and these kernels do not. After a
      change of a weight the next forward packs anew: a replaced parameter, an update in place, an optimizer's step of
      any kind, training in between. Torch does not count all of these, so a sample of each weight is looked at, too;
      only a write through ``weight.data`` or a NumPy array that changes a few values in the middle of inference can
      miss it: call optimize again after that.
    - On a GPU norm_linear and linear_residual read the modules' own weights; float32 (exact, without TF32), bfloat16 or
      float16. The same kernels run under torch.compile, which saves the CPU overhead between them. This has not been
      measured on a GPU. Only a count is known: five launches a block in place of ten, so it should pay where launches
      take most of the time: with small batches, and best in a graph (sait.graphed). On the other hand norm_linear reads
      its rows twice for each 128 columns of its result: in DeiT-S at batch 256 a call takes 0.7 GB (QKV) or 0.9 GB
      (MLP) out of the L2 cache, and one expects some 0.9 times the speed of the model without optimize. It is not
      recommended for large batches until that is measured.

    Where a timm model's head reads prefix tokens only (class token pooling, distilled heads), its last block computes
    these alone: for them the others are keys and values. ``forward_features`` returns them all.

    This serves blocks of LayerNorm and an MLP of GELU (erf, tanh or quick) or SiLU, gated or not, with a LayerNorm
    inside or not, with rotary positions or without, in plain inference: eval mode, no gradient, no autocast, no
    torch.export. Blocks with gated attention, hooks or changed modules run their modules, and so does a dense model
    (set_density without arguments), which is the unpatched one bit for bit; keep=1.0 keeps all tokens in fused
    GEMMs.

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
    state = state_of(model, "optimize")
    for block in sparse_family(model).blocks(model):
        setattr(block, HOLDER, Optimized())
    state.together = state.embedding = None
    return model


def deoptimize(model: Any) -> Any:
    """Undoes optimize, if it was called; restore does so, too.

    Raises:
        TypeError: the model is not sparse.
    """
    state = state_of(model, "deoptimize")
    state.together = state.embedding = None
    for block in sparse_family(model).blocks(model):
        vars(block).pop(HOLDER, None)
    return model


@torch.inference_mode()
def runs_fused(block: Any, family: Family) -> bool:
    """Whether inference on tokens of the weights' type, where these lie, computes the block by fused GEMMs."""
    x = next(block.parameters()).new_empty(0)
    return block_for(block, family, gemms_for(x), x).is_fused


class FusedGemms:
    """A block of fused GEMMs: what PackedBlock and FusedBlock have in common. They are made of a block's plain_parts,
    which are then watched for changes."""

    is_fused = True

    def __init__(self, view: BlockView, mlp: FeedForward, family: Family) -> None:
        self.scale, self.heads, self.turns_pairs = view.scale, (view.heads, view.head_dim), view.rotates == "pairs"
        self._q_norm, self._k_norm, self._norm = (
            None if type(norm) is nn.Identity else norm for norm in (view.q_norm, view.k_norm, view.norm)
        )
        self.activation: Any = activation_of(mlp.act, family)

    def qkv(self, tokens: Tokens, table: Tensor | None) -> tuple[Tensor, Tensor, Tensor, None]:
        """q, k and v (T, H, D)."""
        projected = self.project(tokens.packed)
        if len(projected) == 1:
            q, k, v = projected[0].view(projected[0].shape[0], 3, *self.heads).unbind(1)
        else:
            q, k, v = (t.view(t.shape[0], *self.heads) for t in projected)
        q = q if self._q_norm is None else self._q_norm(q)
        k = k if self._k_norm is None else self._k_norm(k)
        if table is not None:
            q, k = sk.rotate(q, k, tokens.positions, table, pairs=self.turns_pairs)
        return q, k, v, None

    def finish(self, attended: Attended, normed: Tensor | None, tokens: Tokens, after: After | None) -> Tokens:
        """All that follows attention, of the rows that stay."""
        out, selection = attended.out, attended.selection
        out = out if self._norm is None else self._norm(out)
        if selection is None:
            return tokens.with_x(self.close(out, tokens.packed, None).view(tokens.x.shape))
        if after is None:
            assert isinstance(selection, Selection), "attend refuses another"
            return tokens.keep(selection, self.close(out, tokens.packed, selection), attended.ragged)
        assert attended.scores is not None
        if after.needs_dropped:
            x, left = self.add(out, tokens.packed, None), tokens.dropping(attended.ragged)
        else:
            assert isinstance(selection, Selection)
            x = self.add(out, tokens.packed, selection)
            left = tokens.keep(selection, x, attended.ragged)
        left = after(x, attended.scores, selection, left)
        return left.with_x(self.feed_forward(left.packed).view(left.x.shape))

    def project(self, x: Tensor) -> list[Tensor]:
        """(T, C) -> qkv(norm1(x)): (T, 3 A), or q, k and v, (T, A) each."""
        raise NotImplementedError

    def close(self, out: Tensor, x: Tensor, selection: Selection | None) -> Tensor:
        """(S, A), (T, C) -> (S, C): feed_forward(add(...))."""
        return self.feed_forward(self.add(out, x, selection))

    def add(self, out: Tensor, x: Tensor, selection: Selection | None) -> Tensor:
        """(S, A), (T, C) -> (S, C): x + scale1(proj(out)) of the rows that stay."""
        raise NotImplementedError

    def feed_forward(self, x: Tensor) -> Tensor:
        """(S, C) -> (S, C): x + scale2(mlp(norm2(x)))."""
        raise NotImplementedError


class PackedBlock(FusedGemms):
    """On a CPU: GEMMs of packed weights, with vectors in float32, all copied when this is made."""

    def __init__(self, view: BlockView, mlp: FeedForward, family: Family) -> None:
        super().__init__(view, mlp, family)
        layers = projections(view)
        self.dtype = layers[0].weight.dtype
        qkv = layers[0] if len(layers) == 1 else _side_by_side(layers)
        bias = qkv.bias if view.qkv_bias is None else torch.cat(view.qkv_bias)
        self._qkv, self._qkv_features = _packed(qkv.weight, bias), qkv.weight.shape[0]
        self._norm1 = _norm_in_float(view.norm1)
        self._head_norms: tuple[Any, ...] = ()
        both = view.q_norm, view.k_norm
        if all(is_layer_norm(norm, family) for norm in both) and both[0].eps == both[1].eps:
            q_norm, k_norm = self._head_norms = _norm_in_float(view.q_norm), _norm_in_float(view.k_norm)
            self._q_norm, self._k_norm = (lambda q: sk.norm_heads(q, *q_norm)), (lambda k: sk.norm_heads(k, *k_norm))
        self._layers: dict[str, Any] = {
            "proj": _packed(view.proj.weight, view.proj.bias),
            "norm": _norm_in_float(view.norm2),
            "fc1": _packed(mlp.fc1.weight, mlp.fc1.bias, mlp.gate),
            "fc2": _packed(mlp.fc2.weight, mlp.fc2.bias),
            "hidden_features": mlp.fc1.weight.shape[0],
            "gamma1": _float(gamma_of(view.scale1, family)),
            "gamma2": _float(gamma_of(view.scale2, family)),
            "activation": self.activation,
            "hidden_norm": None if has_no_norm(mlp) else _norm_in_float(mlp.norm),
        }

    @property
    def hidden_features(self) -> int:
        return int(self._layers["hidden_features"])

    @property
    def form(self) -> tuple[Any, ...]:
        """What blocks of one sk.PackedEncoder have in common."""
        return (
            *(self.dtype, self.scale, self.heads, self.turns_pairs, self.activation, self.hidden_features),
            self.as_encoder_block().form,
        )

    @property
    def has_modules(self) -> bool:
        """Whether q, k or the attention's result have a norm that is a module of torch."""
        heads_have = self._q_norm is not None or self._k_norm is not None
        return self._norm is not None or (heads_have and not self._head_norms)

    def as_encoder_block(self) -> sk.EncoderBlock:
        layers = {name: self._layers[name] for name in ("proj", "fc1", "fc2", "gamma1", "gamma2", "hidden_norm")}
        heads = dict(zip(("q_norm", "k_norm"), self._head_norms, strict=False))
        return sk.EncoderBlock(norm1=self._norm1, qkv=self._qkv, norm2=self._layers["norm"], **layers, **heads)

    def project(self, x: Tensor) -> list[Tensor]:
        return [sk.packed_linear(x, self._qkv.packed, self._qkv_features, self._qkv.bias, norm=self._norm1)]

    def close(self, out: Tensor, x: Tensor, selection: Selection | None) -> Tensor:
        return sk.packed_block(out, x, selection=selection, **self._layers)

    def add(self, out: Tensor, x: Tensor, selection: Selection | None) -> Tensor:
        proj, gamma = self._layers["proj"], self._layers["gamma1"]
        around: dict[str, Any] = {"residual": x, "selection": selection, "gamma": gamma}
        return sk.packed_linear(out, proj.packed, x.shape[1], proj.bias, **around)

    def feed_forward(self, x: Tensor) -> Tensor:
        layers = self._layers
        fc1, fc2 = layers["fc1"], layers["fc2"]
        hidden = sk.packed_linear(
            *(x, fc1.packed, layers["hidden_features"], fc1.bias),
            norm=layers["norm"],
            activation=self.activation,
            gated=fc1.gated,
            gate_bias=fc1.gate_bias,
        )
        around: dict[str, Any] = {"norm": layers["hidden_norm"], "residual": x, "gamma": layers["gamma2"]}
        return sk.packed_linear(hidden, fc2.packed, x.shape[1], fc2.bias, **around)


class FusedBlock(FusedGemms):
    """On a GPU: GEMMs of the modules' own weights, so nothing has to be kept up to date but what is made of several
    parameters, or of a part of one."""

    def __init__(self, view: BlockView, mlp: FeedForward, family: Family) -> None:
        super().__init__(view, mlp, family)
        self._norm1, self._eps1 = _parameters(view.norm1), view.norm1.eps
        self._norm2, self._eps2 = _parameters(view.norm2), view.norm2.eps
        self._qkv, self._qkv_bias = [_parameters(layer) for layer in projections(view)], view.qkv_bias
        self._proj, self._fc1, self._fc2 = (_parameters(layer) for layer in (view.proj, mlp.fc1, mlp.fc2))
        self._gate = {} if mlp.gate is None else _parameters(mlp.gate)
        self._hidden_norm = None if has_no_norm(mlp) else mlp.norm
        self._scale1, self._gamma1 = _scale(view.scale1, family)
        self._scale2, self._gamma2 = _scale(view.scale2, family)
        # Whether everything here is a module's own dictionary, in which a replaced parameter shows.
        layers = (*projections(view), view.proj, mlp.fc1, mlp.fc2, mlp.gate)
        self.follows = view.qkv_bias is None and not any(
            isinstance(part, (LinearParameters, Tensor)) for part in (*layers, view.scale1, view.scale2)
        )

    def are_plain(self) -> bool:
        """Whether the parameters, too, still are what plain_parts asks for."""
        linears = (*self._qkv, self._proj, self._fc1, self._fc2, *([self._gate] if self._gate else []))
        return all([lies_in_rows(own.get("weight")) for own in linears]) and not any(
            [own.get(name) is None for own in (self._norm1, self._norm2) for name in ("weight", "bias")]
        )

    def project(self, x: Tensor) -> list[Tensor]:
        norm, bias = self._norm1, None if self._qkv_bias is None else torch.cat(self._qkv_bias)
        return [
            sk.norm_linear(
                *(x, norm["weight"], norm["bias"], self._eps1, layer["weight"]), layer["bias"] if bias is None else bias
            )
            for layer in self._qkv
        ]

    def add(self, out: Tensor, x: Tensor, selection: Selection | None) -> Tensor:
        proj, gamma = self._proj, self._scale1.get(self._gamma1)
        return sk.linear_residual(out, proj["weight"], proj["bias"], x, selection=selection, gamma=gamma)

    def feed_forward(self, x: Tensor) -> Tensor:
        norm, fc1, fc2, gate = self._norm2, self._fc1, self._fc2, self._gate
        hidden = sk.norm_linear(
            *(x, norm["weight"], norm["bias"], self._eps2, fc1["weight"], fc1["bias"]),
            activation=self.activation,
            gate=gate.get("weight"),
            gate_bias=gate.get("bias"),
        )
        hidden = hidden if self._hidden_norm is None else self._hidden_norm(hidden)
        return sk.linear_residual(hidden, fc2["weight"], fc2["bias"], x, gamma=self._scale2.get(self._gamma2))


class Packed(NamedTuple):
    """A block's GEMMs of packed weights, and what tells whether they are still up to date."""

    gemms: PackedBlock
    watch: Watch
    parameters: WatchOfParameters


class Optimized:
    """What optimize leaves on a block: its fused GEMMs, made at the first forward and again after a change."""

    def __init__(self) -> None:
        # One assignment each, so that threads that share a model see GEMMs together with their own watch.
        self.made: Packed | None = None
        self._fused: tuple[FusedBlock, Watch, WatchOfParameters | None] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Optimized, ()  # a copy of the model packs for itself

    def packed(self, block: Any, family: Family, x: Tensor) -> PackedBlock | None:
        made = self.made
        if made is None or not (made.watch.unchanged(block) and made.parameters.unchanged()):
            found = plain_parts(block, family)
            made = None
            if found is not None and _are_all(found, x):
                watches = Watch(block, HOLDER), WatchOfParameters(block)  # first: what changes meanwhile shows later
                made = Packed(PackedBlock(*found, family), *watches)
            self.made = made
        return None if made is None or made.gemms.dtype != x.dtype else made.gemms

    def forget(self) -> None:
        """Call while weights are being trained: they are packed anew afterwards, however they were updated."""
        self.made = None

    def traced(self, block: Any, family: Family, x: Tensor) -> FusedBlock | None:
        found = plain_parts(block, family)  # the guards of compiled code are the watch
        return None if found is None else FusedBlock(*found, family)

    def fused(self, block: Any, family: Family, x: Tensor) -> FusedBlock | None:
        made = self._fused
        if (
            made is not None
            and made[1].unchanged(block)
            and made[0].are_plain()
            and (not made[2] or made[2].unchanged())
        ):
            return made[0]
        found = plain_parts(block, family)
        made = None
        if found is not None:
            gemms = FusedBlock(*found, family)
            made = (gemms, Watch(block, HOLDER), None if gemms.follows else WatchOfParameters(block))
        self._fused = made
        return None if made is None else made[0]


Way = Callable[[Optimized, Any, Family, Tensor], FusedGemms | None]


def plain_parts(block: Any, family: Family) -> tuple[BlockView, FeedForward] | None:
    """The block's parts, if fused GEMMs compute the same."""
    view = family.view(block)
    mlp = family.feed_forward(view.mlp)
    if mlp is None or why_not_fused(block, view, mlp, family) is not None:
        return None
    return view, mlp


def why_not_fused(block: Any, view: BlockView, mlp: FeedForward | None, family: Family) -> str | None:
    """Why fused GEMMs would not compute what the block does; None: they do."""
    reason = why_no_plain_block(block, view, mlp, family)
    if reason is None and mlp is not None and not all(lies_in_rows(layer.weight) for layer in _linears(view, mlp)):
        return "a weight is quantised, or does not lie in rows"
    return reason


def _linears(view: BlockView, mlp: FeedForward) -> list[Any]:
    return [*projections(view), view.proj, mlp.fc1, mlp.fc2, *([] if mlp.gate is None else [mlp.gate])]


def _are_all(found: tuple[BlockView, FeedForward], x: Tensor) -> bool:
    """Whether the weights are of a tensor's type and device."""
    return all((layer.weight.device, layer.weight.dtype) == (x.device, x.dtype) for layer in _linears(*found))


def gemms_for(x: Tensor) -> Way | None:
    """Which fused GEMMs serve a forward of tokens like these, if any do; the same for all its blocks."""
    if why_not_here(x) is not None:
        return None
    if _by_packing(x):
        return Optimized.packed
    return Optimized.traced if torch.compiler.is_compiling() else Optimized.fused


def why_not_here(x: Tensor) -> str | None:
    """Why no fused GEMMs serve tokens like these, here and now; None: some do."""
    if torch.is_grad_enabled():
        return "gradients are enabled: use torch.inference_mode() or torch.no_grad()"
    if in_forward_mode():
        return "derivatives in forward mode are wanted"
    if torch.is_autocast_enabled(x.device.type):
        return "autocast is on: cast the model, model.bfloat16()"
    if is_exporting() or torch.jit.is_tracing():
        return "the model is being exported: its program is for other machines, which know a linear layer"
    if not _by_packing(x):
        return None if _has_kernels(x, forced_backend()) else "norm_linear and linear_residual have no kernel here"
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return "packed weights serve tensors on a CPU, uncompiled"  # compiled code fuses for itself
    if x.dtype == torch.bfloat16 and _has_amx():
        return "this CPU has AMX, with which oneDNN is faster in bfloat16"
    return None if x.dtype in (torch.float32, torch.bfloat16) else "packed weights are float32 or bfloat16"


def _by_packing(x: Tensor) -> bool:
    forced = forced_backend()
    return forced == "cpu" or (forced is None and x.device.type == "cpu")


def block_for(block: Any, family: Family, way: Way | None, x: Tensor) -> Block:
    """How this forward computes the block: by fused GEMMs, if it was optimized and they compute the same; else by
    its modules."""
    optimized = vars(block).get(HOLDER)
    if optimized is not None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        optimized.forget()
    if optimized is not None and way is not None:
        gemms = way(optimized, block, family, x)
        if gemms is not None:
            return gemms
    return PlainBlock(family.view(block), family)


@functools.cache
def _has_amx() -> bool:
    return torch.cpu._is_amx_tile_supported()


def _has_kernels(x: Tensor, forced: str | None) -> bool:
    return all([_is_served(op, x, forced) for op in FUSED_OPS])


def _is_served(op: str, x: Tensor, forced: str | None) -> bool:
    return any(forced in (None, name) and refusal(op, name, x) is None for name in ("triton", "cuda"))


def _parameters(layer: Any) -> dict[str, Any]:
    """Those of a linear layer or a norm; of a module its own dictionary."""
    return vars(layer) if type(layer) is LinearParameters else vars(layer)["_parameters"]


def _scale(scale: Any, family: Family) -> tuple[dict[str, Any], str]:
    """Where gamma is, and under which name; nowhere of an Identity."""
    if scale is None or isinstance(scale, Tensor):
        return {"": scale}, ""
    return _parameters(scale), family.scales.get(type(scale), "")


def _side_by_side(layers: Sequence[Any]) -> LinearParameters:
    """Several linear layers of the same rows as one."""
    weight = torch.cat([layer.weight.detach() for layer in layers])
    if all(layer.bias is None for layer in layers):
        return LinearParameters(weight, None)
    biases = [weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias.detach() for layer in layers]
    return LinearParameters(weight, torch.cat(biases))


def _packed(weight: Tensor, bias: Tensor | None, gate: Any = None) -> sk.PackedLayer:
    if gate is None:
        return sk.PackedLayer(sk.pack_linear(weight.detach()), _float(bias))
    packed = sk.pack_linear(weight.detach(), gate.weight.detach())
    return sk.PackedLayer(packed, _float(bias), gated=True, gate_bias=_float(gate.bias))


def _norm_in_float(module: Any) -> tuple[Tensor, Tensor, float]:
    return module.weight.detach().float(), module.bias.detach().float(), module.eps


def _float(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.detach().float()
