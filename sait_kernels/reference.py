"""The plain-torch twin of every op, same signature: the specification. Any floating-point type, float64 included."""

from sait_kernels.ops.compact_attention import compact_attention_reference as compact_attention
from sait_kernels.ops.gather_add_norm import gather_add_norm_reference as gather_add_norm
from sait_kernels.ops.gather_tokens import gather_tokens_reference as gather_tokens
from sait_kernels.ops.gather_tokens import scatter_tokens_reference as scatter_tokens
from sait_kernels.ops.linear_residual import linear_residual_reference as linear_residual
from sait_kernels.ops.merge_tokens import merge_tokens_reference as merge_tokens
from sait_kernels.ops.norm_heads import norm_heads_reference as norm_heads
from sait_kernels.ops.norm_linear import norm_linear_reference as norm_linear
from sait_kernels.ops.packed_embed import packed_embed_reference as packed_embed
from sait_kernels.ops.packed_encoder import packed_encoder_reference as packed_encoder
from sait_kernels.ops.packed_linear import pack_linear_reference as pack_linear
from sait_kernels.ops.packed_linear import packed_block_reference as packed_block
from sait_kernels.ops.packed_linear import packed_linear_reference as packed_linear
from sait_kernels.ops.prune_attention import prune_attention_reference as prune_attention
from sait_kernels.ops.rotate import rotate_reference as rotate
from sait_kernels.ops.score_tokens import score_tokens_reference as score_tokens
from sait_kernels.ops.select import select_mass_reference as select_mass
from sait_kernels.ops.select import select_topk_reference as select_topk

__all__ = [
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
    "rotate",
    "scatter_tokens",
    "score_tokens",
    "select_mass",
    "select_topk",
]
