"""Kernels for Vision Transformers that drop tokens: score, select, gather and attend, as torch ops.

Everything is packed: ``x (T, C)`` holds the tokens of all images of a batch, ``cu_seqlens (B + 1,) int32`` the row
where each image starts. Rows from ``cu_seqlens[-1]`` on, the tail, belong to no image: their scores, their attention
and their gradients are zero, whatever stands there.

``python -m sait_kernels.info`` tells what was built and what serves a call.
"""

from sait_kernels import flops, reference
from sait_kernels.backend import backend, can_run
from sait_kernels.library import __version__
from sait_kernels.ops.compact_attention import compact_attention
from sait_kernels.ops.gather_add_norm import gather_add_norm
from sait_kernels.ops.gather_tokens import gather_tokens, scatter_tokens
from sait_kernels.ops.linear_residual import linear_residual
from sait_kernels.ops.merge_tokens import merge_tokens
from sait_kernels.ops.norm_heads import norm_heads
from sait_kernels.ops.norm_linear import norm_linear
from sait_kernels.ops.packed_embed import packed_embed
from sait_kernels.ops.packed_encoder import EncoderBlock, EncoderStage, PackedEncoder, packed_encoder
from sait_kernels.ops.packed_linear import PackedLayer, pack_linear, packed_block, packed_linear
from sait_kernels.ops.prune_attention import prune_attention
from sait_kernels.ops.rotate import rotate
from sait_kernels.ops.score_tokens import score_tokens
from sait_kernels.ops.select import select_mass, select_topk
from sait_kernels.selection import Selection, uniform_cu_seqlens

__all__ = [
    "EncoderBlock",
    "EncoderStage",
    "PackedEncoder",
    "PackedLayer",
    "Selection",
    "__version__",
    "backend",
    "can_run",
    "compact_attention",
    "gather_add_norm",
    "gather_tokens",
    "linear_residual",
    "merge_tokens",
    "norm_heads",
    "norm_linear",
    "pack_linear",
    "packed_block",
    "packed_embed",
    "packed_encoder",
    "packed_linear",
    "prune_attention",
    "reference",
    "rotate",
    "scatter_tokens",
    "score_tokens",
    "select_mass",
    "select_topk",
    "uniform_cu_seqlens",
]

flops.register()
