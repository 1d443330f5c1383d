"""sparsify: makes a timm Vision Transformer drop tokens, in place and reversibly.

The model keeps its modules, parameters and state_dict. Only its class changes, to a subclass that runs the same blocks
on packed tokens through sait_kernels. It takes blocks and attention modules apart, so while tokens are dropped hooks on
*those* do not fire; hooks on the model and on its linear layers do.
"""

from __future__ import annotations

import functools
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import sait_kernels as sk
from sait.blocks import Tokens, packed, run_block
from sait.density import Record, State, all_rows, check_blocks, in_original_rows
from sait.heads import pad, prefix_is_enough, ragged_head
from sait.optimize import deoptimize
from sait.plan import Plan, Stage
from sait.support import check_model, check_plan
from sait_kernels import Selection

DENSE = "Use the dense model: sait.set_density(model)."


def sparsify(
    model: Any,
    plan: Plan | None = None,
    *,
    block: int | None = None,
    keep: float | int | None = None,
    mass: float | None = None,
    max_keep: int | None = None,
    static: bool = False,
    score: str = "cls",
) -> Any:
    """Makes a timm ViT drop tokens, in place; its state_dict stays the same.

    Prefix tokens (class, distillation, register) are never dropped. A head that pools over patches pools over those
    that are kept. ``forward_features`` returns what is kept: (B, n, C) at a fixed share, and (B, longest, C) with zeros
    behind each image's own tokens where ``mass`` decides; where that is static, ``longest`` is what max_keep allows. On
    a model that is sparse already the new plan replaces the old one.

    >>> import timm
    >>> model = sparsify(timm.create_model("deit_tiny_patch16_224"), block=3, keep=0.45)
    >>> model = restore(model)

    Args:
        model: a timm VisionTransformer or VisionTransformerDistilled.
        plan: what to drop where; or, for one stage, the other arguments instead:
        block: 0-based; its attention sees all tokens, its kept rows go on.
        keep: a float in (0, 1], a share of the patches, or an int, their number.
        mass: the fewest patches that carry this share of the score; exactly one of keep and mass.
        max_keep, static: with mass: at most this many patches, and sizes that no data decides; as in Stage.
        score: "cls", "column" or "cls_value"; see sait_kernels.score_tokens. "cls" reads the attention of the image's
            first row: the class token, or the first register of a model that has only those.

    Returns:
        The model.

    Raises:
        TypeError, ValueError: the model cannot be patched rightly, or the plan does not fit it. The reason is given,
            and the model is as it was.
    """
    if plan is None:
        if block is None:
            raise ValueError(
                "sparsify: expected a Plan, or block and one of keep and mass: sparsify(model, block=3, keep=0.45)."
            )
        plan = Plan((Stage(block, keep, mass, max_keep=max_keep, static=static),), score)
    elif not isinstance(plan, Plan):
        raise TypeError(
            f"sparsify: plan: expected a sait.Plan, got {plan!r}. Write sait.Plan([sait.Stage(block=3, keep=0.45)])."
        )
    elif (block, keep, mass, max_keep, static, score) != (None, None, None, None, False, "cls"):
        raise ValueError(
            "sparsify: expected either a plan or block, keep, mass, max_keep, static and score, got both. "
            "A Stage of the plan takes them, and the plan the score."
        )
    original = type(model)._sait_original if isinstance(model, SparseModel) else type(model)
    if not isinstance(model, SparseModel):
        check_model(model)
    check_plan(model, plan)
    model._sait = State(plan, active=plan)
    model.__class__ = sparse_class(original)
    return model


def restore(model: Any) -> Any:
    """Undoes sparsify, and optimize: the model is of its old class again, and nothing is left on it.

    Raises:
        TypeError: the model is not one that sparsify changed.
    """
    if not isinstance(model, SparseModel):
        raise TypeError(f"restore: model: expected one that sait.sparsify changed, got {type(model).__name__}.")
    deoptimize(model)
    model.__class__ = type(model)._sait_original
    del model._sait
    return model


class SparseModel(VisionTransformer):
    """The forward of a sparse timm ViT. Stands before the model's own class in the bases of sparse_class."""

    _sait_original: type
    _sait: State

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Any:
        plan = self._sait.active
        if plan is None:
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        tokens = _forward_tokens(self, plan, x, attn_mask, is_causal, for_head=prefix_is_enough(self))
        if tokens.ragged:
            return ragged_head(self, tokens, super().forward_head)
        return super().forward_head(tokens.x)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        plan = self._sait.active
        if plan is None:
            self._sait.publish(None)
            return super().forward_features(x, attn_mask=attn_mask, is_causal=is_causal)
        tokens = _forward_tokens(self, plan, x, attn_mask, is_causal)
        if not tokens.ragged:
            return tokens.x
        longest = tokens.max_seqlen
        if not plan.static:
            longest = int(tokens.lengths.max()) if tokens.images else 0
        return pad(packed(tokens.x), tokens.lengths, longest)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        plan = self._sait.active
        if plan is not None and plan.ragged and not prefix_is_enough(self):
            raise ValueError(
                "forward_head: with mass, features of images are padded, and pooling would count the padding. "
                "Call the model itself, or use a fixed share: sait.set_density(model, keep=...)."
            )
        return super().forward_head(x, pre_logits=pre_logits)

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        if self._sait.active is not None:
            raise ValueError(f"forward_intermediates: where tokens are dropped there are no full feature maps. {DENSE}")
        return super().forward_intermediates(*args, **kwargs)

    def _check_plan(self, plan: Plan) -> None:
        check_plan(self, plan)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = super().__reduce_ex__(protocol)[2:]
        return _new, (self._sait_original,), *state  # the class itself cannot be found by its name


@functools.cache
def sparse_class(original: type) -> Any:
    """The subclass of a timm ViT's class that drops tokens; one for each class."""
    body = {"_sait_original": original, "__module__": original.__module__, "__doc__": original.__doc__}
    return type(f"Sparse{original.__name__}", (SparseModel, original), body)


def _new(original: type) -> Any:
    cls = sparse_class(original)
    return cls.__new__(cls)


def _forward_tokens(
    model: Any, plan: Plan, x: Tensor, attn_mask: Tensor | None, is_causal: bool, for_head: bool = False
) -> Tokens:
    """forward_features of a VisionTransformer, with the plan's stages, in whatever layout they leave.

    Where it is for a head that reads prefix tokens only, there may be no others.
    """
    if attn_mask is not None or is_causal:
        raise ValueError(
            f"forward: attn_mask and is_causal are for the full set of tokens, and some are dropped. {DENSE}"
        )
    check_blocks(plan, len(model.blocks))
    grid = tuple(model.patch_embed.dynamic_feat_size(x.shape[-2:]))
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
    x = x.contiguous()  # without prefix tokens it is still the convolution's output, channels outermost
    B, N, _ = x.shape
    cu_seqlens = sk.uniform_cu_seqlens(B, N, x.device)
    tokens = Tokens(x, cu_seqlens, N, ragged=False)
    kept: list[Selection] = []
    recorded = model._sait.recorded
    for i, block in enumerate(model.blocks):
        stage = plan.stage_at(i)
        enough = for_head and i == len(model.blocks) - 1
        arguments = (block, tokens, stage, plan.score, model.num_prefix_tokens, recorded is not None, enough)
        if model.grad_checkpointing:
            tokens, selection, scores = checkpoint(run_block, *arguments, use_reentrant=False)
        else:
            tokens, selection, scores = run_block(*arguments)
        if recorded is not None and scores is not None:
            recorded.append(scores)
        if selection is not None:
            kept.append(in_original_rows(selection, kept[-1] if kept else None, B * N))
        elif stage is not None:  # keep=1.0
            kept.append(kept[-1] if kept else all_rows(B, N, x.device))
    model._sait.publish(Record(tuple(kept), N, model.num_prefix_tokens, grid))
    return tokens._replace(x=model.norm(tokens.x))
