"""The faults that tests/plant_faults.py plants: mistakes that somebody could make, one at a time.

Many show only where several things come together: one instruction set and one type, a head dimension that no vector
divides, a second stage behind a mass, threads that share out one head. Such a fault is what a tier of pairs could lose.
"""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """`before`, once in `file`, becomes `after`. `first`: pytest's arguments for the tests nearest to it."""

    name: str
    file: str
    before: str
    after: str
    first: str


OPS = "tests/ops/test_"
ATTENTION = f"{OPS}compact_attention.py"
KEY_BIAS = f"{OPS}key_bias.py"
SCORE = f"{OPS}score_tokens.py"
SELECT = f"{OPS}select.py"
GATHER = f"{OPS}gather_tokens.py"
GATHER_ADD_NORM = f"{OPS}gather_add_norm.py"
MERGE = f"{OPS}merge_tokens.py"
ROTATE = f"{OPS}rotate.py"
PACKED = f"{OPS}packed_linear.py"
LINEAR = f"{OPS}norm_linear.py"
ENCODER = f"{OPS}packed_encoder.py"
PRUNE = f"{OPS}prune_attention.py"
TAIL = f"{OPS}tail.py"
PUBLISHED = "tests/models/test_published_plans.py"
OPTIMIZE = "tests/models/test_optimize.py tests/models/test_optimize_changes.py"

# Python, Triton's kernels included: nothing is built.
PYTHON = (
    Fault(
        "attention in blocks of keys: the sum of the weights is not rescaled",
        "sait_kernels/triton/compact_attention.py",
        "total = total * shrunk + tl.sum(weights, 1)",
        "total = total + tl.sum(weights, 1)",
        f"{ATTENTION} -k triton",
    ),
    Fault(
        "attention: one column too many is read of a head dimension that is no power of two",
        "sait_kernels/triton/attention_rows.py",
        "m = m & (o_d < D)[None, :]\n        parts += ",
        "m = m & (o_d <= D)[None, :]\n        parts += ",
        f"{ATTENTION} -k triton",
    ),
    Fault(
        "attention's gradient: the mean of a row is not rescaled from one block of keys to the next",
        "sait_kernels/triton/compact_attention_backward.py",
        "mean = mean * shrunk + tl.sum(weights * dweights, 1)",
        "mean = mean + tl.sum(weights * dweights, 1)",
        f"{ATTENTION} -k triton",
    ),
    Fault(
        "attention's gradient: nobody writes dq of the rows that were dropped",
        "sait_kernels/triton/compact_attention_backward.py",
        "dq = q.new_empty(q.shape) if indices is None else q.new_zeros(q.shape)",
        "dq = q.new_empty(q.shape)",
        f"{ATTENTION} -k triton",
    ),
    Fault(
        "attention's gradient: the heads of k lie as far apart as those of q",
        "sait_kernels/triton/compact_attention_backward.py",
        "b_k = load_rows(p_k + h * s_kh, o_j, s_kt, m_j, D, PARTS)",
        "b_k = load_rows(p_k + h * s_qh, o_j, s_kt, m_j, D, PARTS)",
        f"{ATTENTION} -k triton",
    ),
    Fault(
        "attention with a bias: the difference of two logits that both are -inf",
        "sait_kernels/triton/attention_rows.py",
        'return tl.where(largest == float("-inf"), 0.0, largest) if BIAS else largest',
        "return largest",
        f"{KEY_BIAS} -k triton",
    ),
    Fault(
        "the gradient of a bias: all heads write where the first one does",
        "sait_kernels/triton/compact_attention_backward.py",
        "tl.store(p_head_sums + h * T + o_j, dkey_bias, m_j)",
        "tl.store(p_head_sums + o_j, dkey_bias, m_j)",
        f"{KEY_BIAS} -k triton",
    ),
    Fault(
        "LayerNorm's gradient without the mean of g",
        "sait_kernels/triton/gather_add_norm.py",
        "b_dr += rstd * (g - _mean(g, C) - z * _mean(g * z, C))",
        "b_dr += rstd * (g - z * _mean(g * z, C))",
        f"{GATHER_ADD_NORM} -k triton",
    ),
    Fault(
        "gather_add_norm's gradient: y is read as if its rows had no gaps",
        "sait_kernels/triton/gather_add_norm.py",
        "b_y = widened(tl.load(p_y + o_row * s_y + o_c[None, :], m, other=0.0))",
        "b_y = widened(tl.load(p_y + o_row * C + o_c[None, :], m, other=0.0))",
        f"{GATHER_ADD_NORM} -k triton",
    ),
    Fault(
        "rotate's gradient: each of two that turn together keeps its own sine",
        "sait_kernels/triton/rotate.py",
        "w1, w2 = sin2, -sin1",
        "w1, w2 = sin1, -sin2",
        f"{ROTATE} -k triton",
    ),
    Fault(
        "rotate: the table's gradient counts rows without a position",
        "sait_kernels/ops/rotate.py",
        ".masked_fill((positions < 0)[:, None, None], 0)",
        "",
        f"{ROTATE} -k values",
    ),
    Fault(
        "scatter: the empty places of the last block count as row 0",
        "sait_kernels/triton/gather_tokens.py",
        "kept = tl.load(p_indices + o_i, o_i < S, other=-1)",
        "kept = tl.load(p_indices + o_i, o_i < S, other=0)",
        f"{GATHER} -k triton",
    ),
    Fault(
        "merge_tokens: rows of no image are summed where nobody checks the targets",
        "sait_kernels/triton/merge_tokens.py",
        "m_image = m_s & (o_s < tl.load(p_cu + images))",
        "m_image = m_s",
        f"{MERGE} -k checked",
    ),
    Fault(
        "linear_residual: LayerScale before the bias",
        "sait_kernels/triton/linear_residual.py",
        """\
    if HAS_BIAS:
        acc += widened(tl.load(p_bias + o_j, m_j, other=0.0))[None, :]
    if SCALES:
        acc *= widened(tl.load(p_gamma + o_j, m_j, other=0.0))[None, :]
""",
        """\
    if SCALES:
        acc *= widened(tl.load(p_gamma + o_j, m_j, other=0.0))[None, :]
    if HAS_BIAS:
        acc += widened(tl.load(p_bias + o_j, m_j, other=0.0))[None, :]
""",
        f"{LINEAR} -k 'triton and residual'",
    ),
    Fault(
        "norm_linear: the variances of two parts of a row are merged without how many the first has",
        "sait_kernels/triton/norm_linear.py",
        "distance * distance * k * share",
        "distance * distance * share",
        f"{LINEAR} -k 'triton and test_norm_linear'",
    ),
    Fault(
        "norm_linear: the gate's rows lie as far apart as the weight's",
        "sait_kernels/triton/norm_linear.py",
        "load_weight(p_gate, o_j, k + o_k, s_gate, m_j, m_k)",
        "load_weight(p_gate, o_j, k + o_k, s_weight, m_j, m_k)",
        f"{LINEAR} -k 'triton and test_activations'",
    ),
    Fault(
        "cls_value: the first patch is left out of the sum that is shared out",
        "sait_kernels/triton/score_tokens.py",
        "first + tl.arange(0, COLUMNS) >= num_prefix, b_u",
        "first + tl.arange(0, COLUMNS) > num_prefix, b_u",
        f"{SCORE} -k 'triton and cls_value'",
    ),
    Fault(
        "column scores: a row's sum is not rescaled from one block of keys to the next",
        "sait_kernels/triton/score_columns.py",
        "total = total * numerators(largest, larger, scale) + tl.sum",
        "total = total + tl.sum",
        f"{SCORE} -k 'triton and column'",
    ),
    Fault(
        "column scores' gradient: dk of a block takes the gradients of the first block",
        "sait_kernels/triton/score_columns.py",
        "b_grad = tl.load(p_grad + begin + o_n, m_n, other=0.0)[:, None]",
        "b_grad = tl.load(p_grad + begin + tl.arange(0, BLOCK), m_n, other=0.0)[:, None]",
        f"{SCORE} -k 'triton and column'",
    ),
    Fault(
        "select: of an image that is longer than a block the lowest key is that of the first chunk",
        "sait_kernels/triton/select.py",
        "            low = tl.minimum(low, tl.min(tl.where(b_keys == OUTSIDE, 0x7FFFFFFF, b_keys)))\n",
        "",
        f"{SELECT} -k 'triton and longer'",
    ),
    Fault(
        "offsets behind a shorter image: its prefix rows may be dropped",
        "sait_kernels/triton/select.py",
        "rows += tl.sum(_rows(tl.minimum(b_n, longest), num_prefix, count, rate))",
        "rows += tl.sum(_rows(tl.minimum(b_n, longest), 0, count, rate))",
        f"{TAIL} -k 'triton and (select or count)'",
    ),
    Fault(
        "prune_attention scores by the given scale, and attends by the default one",
        "sait_kernels/triton/prune_attention.py",
        "return compact_attention(q, k, v, cu_seqlens, max_seqlen, indices, kept, scale), indices, kept",
        "return compact_attention(q, k, v, cu_seqlens, max_seqlen, indices, kept), indices, kept",
        f"{PRUNE} -k 'triton and scale'",
    ),
    Fault(
        "the tail: what does not fill a block is left as it was",
        "sait_kernels/triton/tail.py",
        "tl.cdiv(size, BLOCK).to(tl.int32)",
        "(size // BLOCK).to(tl.int32)",
        f"{TAIL} -k 'triton and (attention or score)'",
    ),
    Fault(
        "compact_attention: the shape for the compiler forgets the selection",
        "sait_kernels/ops/compact_attention.py",
        "q.new_empty(q.shape[0] if indices is None else indices.shape[0], q.shape[1] * q.shape[2])",
        "q.new_empty(q.shape[0], q.shape[1] * q.shape[2])",
        f"{ATTENTION} -k 'opcheck or compiles'",
    ),
    Fault(
        "scatter's gradient: base gets one in the rows that were overwritten",
        "sait_kernels/ops/gather_tokens.py",
        "grad_base = ops.scatter_tokens(torch.zeros_like(grad_y), indices, grad.shape[0], grad)",
        "grad_base = grad",
        f"{GATHER} -k 'cpu and scatter'",
    ),
    Fault(
        "merge_tokens' second derivative: that of dweight is left out of the result's gradient",
        "sait_kernels/ops/merge_tokens.py",
        "return of_grad + merged(x, grad_dweight)",
        "return of_grad",
        f"{MERGE} -k second",
    ),
    Fault(
        "linear_residual's gradient: gamma's, of a branch without its bias",
        "sait_kernels/ops/linear_residual.py",
        "branch = F.linear(y, weight, None if bias is None else bias.to(y.dtype))",
        "branch = F.linear(y, weight)",
        f"{LINEAR} -k 'cpu and residual'",
    ),
    Fault(
        "norm_linear's gradient: that of the tanh form of GELU",
        "sait_kernels/activation.py",
        "return torch.ops.aten.gelu_backward(grad, x)",
        'return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")',
        f"{LINEAR} -k 'cpu and test_norm_linear'",
    ),
    Fault(
        "norm_linear's gradient: the gate's, without what it multiplies",
        "sait_kernels/ops/norm_linear.py",
        "derivative(grad * linear(weight, bias), gates)",
        "derivative(grad, gates)",
        f"{LINEAR} -k 'cpu and test_activations'",
    ),
    Fault(
        "packed_block: the shape for the compiler has the rows from before the selection",
        "sait_kernels/ops/packed_linear.py",
        "return x.new_empty(y.shape[0], x.shape[1])",
        "return x.new_empty(x.shape)",
        f"{PACKED} -k opcheck",
    ),
    Fault(
        "select_mass: the bound of what an image keeps forgets its prefix rows",
        "sait_kernels/ops/select.py",
        "return max_seqlen if max_keep is None else min(max_seqlen, num_prefix + max_keep)",
        "return max_seqlen if max_keep is None else min(max_seqlen, max_keep)",
        f"{SELECT} {TAIL} -k 'cpu and mass'",
    ),
    Fault(
        "prune_attention's gradient takes min_keep for the scale",
        "sait_kernels/ops/prune_attention.py",
        "*_, ctx.scale, _, _, _ = inputs",
        "*_, ctx.scale, _, _ = inputs",
        f"{PRUNE} -k 'cpu and gradients'",
    ),
    Fault(
        "a rate of 0.55 keeps 56 of 100",
        "sait_kernels/selection.py",
        "math.ceil(rate * patches - 1e-6)",
        "math.ceil(rate * patches)",
        f"{SELECT} -k 'cpu and rate'",
    ),
    Fault(
        "compiled code: the end of an inner `with backend` is that of the outer one",
        "sait_kernels/backend.py",
        "_forced_for_compiled = list(_entered.values())[-1] if _entered else None",
        "_forced_for_compiled = None",
        "tests/test_backend.py -k compiled",
    ),
    Fault(
        "Triton's kernels are launched unchecked",
        "sait_kernels/registration.py",
        "        check(*arguments)\n",
        "",
        f"{LINEAR} -k 'triton and bad'",
    ),
    Fault(
        "fused rows: who stays is looked up one row too far",
        "python/sait/methods/after.py",
        "stays = torch.zeros(total + 1, dtype=torch.bool, device=x.device).index_fill(0, stay, True)[:total]",
        "stays = torch.zeros(total + 1, dtype=torch.bool, device=x.device).index_fill(0, stay + 1, True)[:total]",
        PUBLISHED,
    ),
    Fault(
        "merging: a row that has merged before counts once",
        "python/sait/methods/after.py",
        "weight = (sizes / merged_sizes.index_select(0, target))",
        "weight = (torch.ones_like(sizes) / merged_sizes.index_select(0, target))",
        PUBLISHED,
    ),
    Fault(
        "merging: sizes are not added to the logits",
        "python/sait/tokens.py",
        "return None if self.sizes is None else self.sizes.log()",
        "return None",
        PUBLISHED,
    ),
    Fault(
        "pairs: a register takes part in the matching",
        "python/sait/methods/pairs.py",
        "evens, odds = slice(P + P % 2, None, 2), slice(P + (P + 1) % 2, None, 2)",
        "evens, odds = slice(1 + P % 2, None, 2), slice(P + (P + 1) % 2, None, 2)",
        PUBLISHED,
    ),
    Fault(
        "sampling: of two sums that are equally near the higher is taken",
        "python/sait/methods/selectors.py",
        "nearest = torch.searchsorted((sums[:, 1:] + sums[:, :-1]) / 2, points)",
        "nearest = torch.searchsorted((sums[:, 1:] + sums[:, :-1]) / 2, points, right=True)",
        PUBLISHED,
    ),
    Fault(
        "an optimized block behind a mass, with a share of its own: taken for equal lengths",
        "python/sait/methods/fusion.py",
        "ragged = tokens.ragged or stage.selector.ragged",
        "ragged = stage.selector.ragged",
        "tests/models/test_optimize.py -k mass_left",
    ),
    Fault(
        "stochastic depth of ragged images: every row is its own image",
        "python/sait/execution/plain.py",
        "if not tokens.ragged or not drops_paths(module):",
        "if not drops_paths(module):",
        "tests/models/test_training.py -k drop_path",
    ),
    Fault(
        "a stale weight: the step of a fused optimizer is not seen",
        "python/sait/execution/watch.py",
        "self.watched: tuple[Any, ...] = held(owns, by_identity=True, tensors=tensors), sample",
        "self.watched: tuple[Any, ...] = (held(owns, by_identity=True, tensors=tensors),)",
        "tests/models/test_apart.py",
    ),
    Fault(
        "blocks together: another block in the place of one is not noticed",
        "python/sait/execution/encoder.py",
        "optimized.made is not made or",
        "",
        "tests/models/test_encoder.py",
    ),
    Fault(
        "a stale token: positions of a packed embedding are not watched",
        "python/sait/execution/embedding.py",
        "added = [*view.prefix, *([] if positions is None else [positions])]",
        "added = [*view.prefix]",
        "tests/models/test_embedding.py",
    ),
    Fault(
        "stale weights: what is packed of a whole model outlives training",
        "python/sait/execution/encoder.py",
        "state.together = state.embedding = None  # weights",
        "pass  # weights",
        "tests/models/test_embedding.py",
    ),
    Fault(
        "a packed embedding adds positions to the class token that are a patch's",
        "python/sait/execution/embedding.py",
        "rows is not None and view.count_prefix:",
        "rows is not None:",
        "tests/models/test_embedding.py",
    ),
    Fault(
        "a packed embedding of images of another size",
        "python/sait/execution/embedding.py",
        "return (height, width) == tuple(view.size)",
        "return height == view.size[0]",
        "tests/models/test_embedding.py",
    ),
    Fault(
        "hooks on attention are passed over",
        "python/sait/families/timm_vit.py",
        "return block, block.attn, block.attn.attn_drop",
        "return (block,)",
        "tests/models/test_apart.py",
    ),
    Fault(
        "hooks on the norm of the stage's block are passed over",
        "python/sait/execution/plain.py",
        'and not any("forward" in vars(part) or has_hooks(part) for part in passed_over)',
        "and len(passed_over) > 0",
        "tests/models/test_apart.py",
    ),
    Fault(
        "a new plan throws away the class that parametrize put on the model",
        "python/sait/sparsify.py",
        "if not isinstance(part, SparseModel):  # a sparse",
        "if True:  # a sparse",
        "tests/models/test_apart.py",
    ),
    Fault(
        "full maps: what a second stage drops is as it was at the first",
        "python/sait/tokens.py",
        "self._base = self.home(tokens)",
        "self._base = self.home(tokens) if self._base is None else self._base",
        "tests/models/test_maps.py",
    ),
    Fault(
        "optimize: rotary pairs turn as halves",
        "python/sait/execution/optimize.py",
        'view.rotates == "pairs"',
        'view.rotates == "neither"',
        "tests/models/test_optimize.py",
    ),
    Fault(
        "a second derivative of attention is zero",
        "sait_kernels/ops/compact_attention.py",
        'refuse_second_derivative("compact_attention")',
        "pass",
        "tests/test_derivatives.py",
    ),
    Fault(
        "a derivative in forward mode is zero",
        "sait_kernels/backend.py",
        "elif in_forward_mode() and any(",
        "elif False and any(",
        "tests/test_derivatives.py",
    ),
    Fault(
        "a checkpoint's metadata may ask timm for anything",
        "python/sait/families/__init__.py",
        "if unknown := sorted(set(kwargs) - SHAPING):",
        "if unknown := sorted(set()):",
        "tests/train/test_checkpoint.py",
    ),
    Fault(
        "transformers' DINOv3: neighbours turn together",
        "python/sait/families/hf_dino.py",
        'rotates="halves"',
        'rotates="pairs"',
        "tests/models/test_hf.py",
    ),
    Fault(
        "optimize: the MLP takes the LayerScale of the attention",
        "python/sait/execution/optimize.py",
        '"gamma2": _float(gamma_of(view.scale2, family)),',
        '"gamma2": _float(gamma_of(view.scale1, family)),',
        "tests/models/test_optimize.py -k 'same_results and not triton'",
    ),
    Fault(
        "pooling without prefix: each image skips the prefixes of those before it, and not its own",
        "python/sait/families/pooling.py",
        "skip * (image + 1)",
        "skip * image",
        "tests/models/test_exactness.py -k 'oracle and cpu'",
    ),
    Fault(
        "attention pooling sees one row of padding",
        "python/sait/families/pooling.py",
        "absent = torch.arange(width, device=rows.device) >= lengths[:, None]",
        "absent = torch.arange(width, device=rows.device) > lengths[:, None]",
        "tests/models/test_exactness.py -k 'oracle and cpu'",
    ),
    Fault(
        "the record of keep=1.0 behind a stage that drops: all rows",
        "python/sait/tokens.py",
        """\
        rows = self._first_rows() if self.rows is None else self.rows
        return Selection(""",
        """\
        rows = self._first_rows()
        return Selection(""",
        "tests/models/test_lifecycle.py -k 'selections and cpu'",
    ),
    Fault(
        "the record of a second stage counts in the rows that the first one left",
        "python/sait/tokens.py",
        "        if self.rows is not None:\n",
        "        if False:\n",
        "tests/models/test_lifecycle.py -k 'selections and cpu'",
    ),
    Fault(
        "set_density asks nobody whether the model can run so",
        "python/sait/state.py",
        "    check_plan(model, wanted, sparse_family(model))\n",
        "",
        "tests/models/test_refusals.py -k 'mass or more'",
    ),
    Fault(
        "macs: attention counts the queries that are dropped",
        "python/sait/cost.py",
        "attention = 2 * r.queries * r.entering * A",
        "attention = 2 * r.entering * r.entering * A",
        "tests/models/test_macs.py -k pruned",
    ),
    Fault(
        "distillation: the shares of a teacher with two prefix tokens count one of them",
        "python/sait/train/distill.py",
        "of_patches = scores.view(images, -1)[:, num_prefix:]",
        "of_patches = scores.view(images, -1)[:, 1:]",
        "tests/train/test_distill.py -k shares",
    ),
    Fault(
        "distillation: the loss of the logits shrinks with the temperature",
        "python/sait/train/distill.py",
        "return temperature**2 * F.kl_div",
        "return temperature * F.kl_div",
        "tests/train/test_distill.py -k logit",
    ),
    Fault(
        "manifold distillation: rows of a student with another number of prefix tokens",
        "python/sait/train/manifold.py",
        "tokens = student_prefix + patches.shape[1]",
        "tokens = num_prefix + patches.shape[1]",
        "tests/train/test_distill.py -k student_kept",
    ),
    Fault(
        "a checkpoint comes back at the density of its plan, not at its own",
        "python/sait/checkpoint.py",
        'Plan.from_dict(metadata["active"])',
        'Plan.from_dict(metadata["plan"])',
        "tests/train/test_checkpoint.py",
    ),
    Fault(
        "a fused linear layer takes no notice of autocast",
        "python/sait/execution/linear.py",
        '        and not torch.is_autocast_enabled("cpu")\n',
        "",
        "tests/models/test_linear.py",
    ),
)

# csrc/cpu and csrc/ops: the library of the CPU kernels is built again.
CPU = (
    Fault(
        "attention: the weights of the last, partial vector of keys are left out of their sum",
        "csrc/cpu/compact_attention.cpp",
        "    sum1 = sum1 + p;\n    store_as<E>(weights + whole, p, rest);",
        "    store_as<E>(weights + whole, p, rest);",
        f"{ATTENTION} -k 'cpu and values'",
    ),
    Fault(
        "attention: lanes behind the last key take part in the largest logit",
        "csrc/cpu/compact_attention.cpp",
        "m1 = max(m1, first(load(s + whole, rest), rest, -kInfinity));",
        "m1 = max(m1, load(s + whole, rest));",
        f"{ATTENTION} -k 'cpu and logits'",
    ),
    Fault(
        "attention in bfloat16 products: a negative scale is forgotten where all rows stay",
        "csrc/cpu/compact_attention.cpp",
        "const bool in_place = indices == nullptr && !negate;",
        "const bool in_place = indices == nullptr;",
        f"{ATTENTION} -k 'cpu and scale'",
    ),
    Fault(
        "attention shared out by queries: a thread starts at the block of its own number",
        "csrc/cpu/compact_attention.cpp",
        "for (int64_t i0 = from * block;",
        "for (int64_t i0 = part * block;",
        f"{ATTENTION} tests/test_properties.py -k '577 and cpu or threads'",
    ),
    Fault(
        "attention's gradient: dq has the wrong sign at a negative scale",
        "csrc/cpu/compact_attention.cpp",
        "const float sign = p.scale < 0 ? -1.f : 1.f;",
        "const float sign = 1.f;",
        f"{ATTENTION} -k 'cpu and scale'",
    ),
    Fault(
        "attention with a bias: the padding of the keys has 0, which may be the largest logit",
        "csrc/cpu/compact_attention.cpp",
        "std::fill(bias + n, bias + ld, -std::numeric_limits<float>::infinity());",
        "std::fill(bias + n, bias + ld, 0.f);",
        f"{KEY_BIAS} -k cpu",
    ),
    Fault(
        "the gradient of a bias: of several blocks of queries the last one alone is left",
        "csrc/cpu/compact_attention.cpp",
        "dbias[j] += block_sums[j];",
        "dbias[j] = block_sums[j];",
        f"{KEY_BIAS} -k cpu",
    ),
    Fault(
        "column scores: the padding of a block of queries weighs as much as they do",
        "csrc/cpu/score_tokens.cpp",
        "for (int64_t r = i; r < std::min(i + 4, rows); ++r)",
        "for (int64_t r = i; r < i + 4; ++r)",
        f"{SCORE} -k 'cpu and column'",
    ),
    Fault(
        "cls_value: all rows but the first share, whatever the prefix",
        "csrc/cpu/score_tokens.cpp",
        "return sum_over(n - num_prefix, [=](int64_t i, int m) { return load_lanes<F32>(u + num_prefix + i, m); });",
        "return sum_over(n - 1, [=](int64_t i, int m) { return load_lanes<F32>(u + 1 + i, m); });",
        f"{SCORE} -k 'cpu and prefix'",
    ),
    Fault(
        "scores in bfloat16 products: a partial step is masked by pairs",
        "csrc/cpu/score_tokens.cpp",
        "_mm512_maskz_loadu_epi16((1u << n) - 1u, p)",
        "_mm512_maskz_loadu_epi16((1u << n / 2) - 1u, p)",
        f"{SCORE} -k 'cpu and values'",
    ),
    Fault(
        "cls_value's gradient: what is shared flows into prefix rows, too",
        "csrc/cpu/score_tokens.cpp",
        "(g[j] - (j < p.num_prefix ? 0.f : static_cast<float>(shared))) / U",
        "(g[j] - static_cast<float>(shared)) / U",
        f"{SCORE} -k 'cpu and cls_value'",
    ),
    Fault(
        "select: zeros of both signs do not tie",
        "csrc/cpu/select.cpp",
        "(scores[i] == scores[i] ? scores[i] : kLowest) + 0.f",
        "scores[i] == scores[i] ? scores[i] : kLowest",
        f"{SELECT} -k 'cpu and zeros'",
    ),
    Fault(
        "select_mass: where the share is reached exactly, one more stays",
        "csrc/cpu/select.cpp",
        "k < n && cumulative < rule.mass * total",
        "k < n && cumulative <= rule.mass * total",
        f"{SELECT} -k 'cpu and mass'",
    ),
    Fault(
        "scatter: each thread looks for its rows from the first kept one on",
        "csrc/cpu/gather_tokens.cpp",
        "std::lower_bound(p.indices, p.indices + p.rows, begin) - p.indices",
        "0",
        "tests/test_properties.py -k 'threads or scatter'",
    ),
    Fault(
        "scatter: base is read as if its rows had no gaps",
        "csrc/cpu/gather_tokens.cpp",
        "base + t * p.base_row_stride",
        "base + t * p.row_bytes",
        f"{GATHER} -k 'cpu and scatter'",
    ),
    Fault(
        "merge_tokens: a row of weight 1 is copied, whatever else goes into the same row",
        "csrc/cpu/merge_tokens.cpp",
        "next[t] < 0 && p.weight[t] == 1.f",
        "p.weight[t] == 1.f",
        f"{MERGE} -k 'cpu and values'",
    ),
    Fault(
        "merge_tokens: sums in the opposite order of the rows",
        "csrc/cpu/merge_tokens.cpp",
        "for (int64_t t = p.rows - 1; t >= 0; --t)",
        "for (int64_t t = 0; t < p.rows; ++t)",
        f"{MERGE} -k 'cpu and order'",
    ),
    Fault(
        "gather_add_norm's gradient: without gamma the chunks' sums are taken for two wide",
        "csrc/cpu/gather_add_norm.cpp",
        "p.partials + (c * 3 + s) * p.channels + i",
        "p.partials + (c * (p.gamma == nullptr ? 2 : 3) + s) * p.channels + i",
        f"{GATHER_ADD_NORM} -k 'cpu and values'",
    ),
    Fault(
        "rotate's gradient: neighbours turn on, where they should turn back",
        "csrc/cpu/rotate.cpp",
        "    if (p.transposed) w = swap_neighbours(w);\n",
        "",
        f"{ROTATE} -k 'cpu and values'",
    ),
    Fault(
        "rotate: the heads of k lie as far apart as those of q",
        "csrc/cpu/rotate.cpp",
        "const int64_t stride = views[side].head_stride;",
        "const int64_t stride = views[0].head_stride;",
        f"{ROTATE} -k 'cpu and values'",
    ),
    Fault(
        "LayerNorm: lanes behind the last channel count for the variance",
        "csrc/cpu/rows.h",
        "const Vec centred = first(load_lanes<E>(row + i, n) - set(mean), n, 0.f);",
        "const Vec centred = load_lanes<E>(row + i, n) - set(mean);",
        f"{GATHER_ADD_NORM} -k 'cpu and values'",
    ),
    Fault(
        "packed_linear: of a long sum in parts the last one alone is left",
        "csrc/cpu/packed_linear.cpp",
        "tile + j, N, part > 0, 0, ahead);",
        "tile + j, N, false, 0, ahead);",
        f"{PACKED} -k values",
    ),
    Fault(
        "packed_linear: every block of rows takes the residual rows of the first",
        "csrc/cpu/packed_linear.cpp",
        "    p.indices += first;\n",
        "",
        f"{PACKED} -k 'gathered or stay'",
    ),
    Fault(
        "packed_linear: a gated layer has as many blocks of columns as one without a gate",
        "csrc/cpu/packed_linear.cpp",
        "return packed_blocks(p.outputs, p.gated);",
        "return packed_blocks(p.outputs, false);",
        f"{PACKED} -k gated",
    ),
    Fault(
        "packed_linear, GELU's tanh form: two digits of a coefficient are swapped",
        "csrc/cpu/activation.h",
        "0.102943239f",
        "0.102934239f",
        f"{PACKED} -k 'activations or far_out'",
    ),
    Fault(
        "products: where four rows are left over, three are computed",
        "csrc/cpu/gemm.h",
        "case 4: return tile(Int<4>{}, i);",
        "case 4: return tile(Int<3>{}, i);",
        f"{ATTENTION} {PACKED} -k 'cpu and values or packed and layers'",
    ),
    Fault(
        "exp2 without AVX-512: two digits of a coefficient are swapped",
        "csrc/cpu/vec.h",
        "0.6931471825f",
        "0.6931417825f",
        f"{ATTENTION} -k instruction_sets",
    ),
    Fault(
        "float16 in plain loops: numbers below 2^-14 become zero",
        "csrc/cpu/vec.h",
        "return sign | static_cast<uint16_t>(std::nearbyint(value * 0x1p24f));",
        "return sign;",
        f"{GATHER_ADD_NORM} -k smallest",
    ),
    Fault(
        "compact_attention: a kept row of the next image is not refused",
        "csrc/ops/compact_attention.cpp",
        "kept.indices[last - 1] < images[b + 1]",
        "kept.indices[last - 1] <= images[b + 1]",
        "tests/test_bad_input.py -k message",
    ),
    Fault(
        "compact_attention's gradient: the tail of dv is left as it was",
        "csrc/ops/compact_attention.cpp",
        "for (const Tensor& t : {dq, dk, dv})",
        "for (const Tensor& t : {dq, dk})",
        f"{TAIL} -k 'cpu and attention'",
    ),
    Fault(
        "scatter: a base with other channels is not refused",
        "csrc/ops/gather_tokens.cpp",
        "base->size(0) == total && base->size(1) == y.size(1), op",
        "base->size(0) == total, op",
        "tests/test_bad_input.py -k message",
    ),
    Fault(
        "merge_tokens: a target behind the last image's rows is not refused",
        "csrc/ops/merge_tokens.cpp",
        "values[t] >= -1 && values[t] < last",
        "values[t] >= -1 && values[t] <= last",
        "tests/test_bad_input.py -k message",
    ),
    Fault(
        "packed_linear: a weight packed for other inputs is not refused",
        "csrc/ops/packed_linear.h",
        "packed.size(0) == blocks && packed.size(1) == depth &&",
        "packed.size(0) == blocks &&",
        f"{PACKED} -k bad",
    ),
    Fault(
        "packed_block: the hidden layer's norm has the eps of the one before fc1",
        "csrc/ops/packed_linear.cpp",
        ".eps = hidden_eps,",
        ".eps = eps,",
        f"{PACKED} -k inner_norm",
    ),
    Fault(
        "packed_encoder: who is left is counted in the rows that the stage saw",
        "csrc/cpu/packed_encoder.cpp",
        "to[t] = from[kept.indices[t]];",
        "to[t] = kept.indices[t];",
        f"{ENCODER} -k 'single_ops'",
    ),
    Fault(
        "packed_encoder: a second selection is written over the offsets of the first",
        "csrc/cpu/packed_encoder.cpp",
        "work_.cu_seqlens[++selections_ % 2]",
        "work_.cu_seqlens[0 * ++selections_]",
        f"{ENCODER} -k 'single_ops'",
    ),
    Fault(
        "packed_encoder: images that no thread takes alone are left out",
        "csrc/cpu/packed_encoder.cpp",
        "if (tasks * size < images) encode",
        "if (tasks == 0) encode",
        f"{ENCODER} -k 'single_ops'",
    ),
    Fault(
        "packed_encoder: keys are normalised as queries are",
        "csrc/cpu/packed_encoder.cpp",
        "norm(k, b.k_norm_weight, b.k_norm_bias, normed",
        "norm(k, b.q_norm_weight, b.q_norm_bias, normed",
        f"{ENCODER} -k 'single_ops'",
    ),
    Fault(
        "norm_heads: the second head starts behind the first as it does in the result",
        "csrc/cpu/norm_heads.cpp",
        "x += p.x.head_stride, out += D",
        "x += D + 8, out += D",
        f"{OPS}norm_heads.py",
    ),
    Fault(
        "packed_embed: every block of patches has the positions of the first",
        "csrc/cpu/packed_linear.cpp",
        "PackedLinearParams some = some_rows<E>(patches, first, rows);",
        "PackedLinearParams some = some_rows<E>(patches, 0, rows);",
        f"{OPS}packed_embed.py",
    ),
    Fault(
        "packed_embed: the last pixels of a patch's row are left out where they are no 16 bytes",
        "csrc/cpu/packed_linear.cpp",
        "  std::memcpy(to + bytes - 16, from + bytes - 16, 16);\n",
        "  if (bytes % 16 == 0) std::memcpy(to + bytes - 16, from + bytes - 16, 16);\n",
        f"{OPS}packed_embed.py",
    ),
    Fault(
        "packed_embed: the first image alone has prefix rows",
        "csrc/cpu/packed_linear.cpp",
        "if (block == 0) std::copy_n(static_cast<const T*>(p.prefix)",
        "if (task == 0) std::copy_n(static_cast<const T*>(p.prefix)",
        f"{OPS}packed_embed.py",
    ),
    Fault(
        "a watch looks at a dictionary once",
        "csrc/module.cpp",
        "if (version != kNoTag && version == seen.version) continue;",
        "if (version != kNoTag && seen.version != kNoTag) continue;",
        "tests/models/test_watch.py -k every_change",
    ),
    Fault(
        "a watch does not look where a parameter lies",
        "csrc/module.cpp",
        "number(PyObject_CallMethodNoArgs(tensor.ptr(), data_ptr)),",
        "int64_t(data_ptr != nullptr),",
        "tests/models/test_watch.py -k parameter",
    ),
    Fault(
        "a watch finds equal what holds less than before",
        "csrc/module.cpp",
        "if (!same || next != seen.entries.size()) return false;",
        "if (!same) return false;",
        "tests/models/test_watch.py -k every_change",
    ),
)

# csrc/cuda: run on the host, as `make emulate` does.
CUDA = (
    Fault(
        "attention: a scale of 0",
        "csrc/cuda/attention.cuh",
        "return fmaxf(fabsf(scale) * 1.44269504f, FLT_MIN);",
        "return fabsf(scale) * 1.44269504f;",
        f"{ATTENTION} -k 'cuda and scale'",
    ),
    Fault(
        "attention: a negative scale leaves two of eight columns of the queries as they are",
        "csrc/cuda/attention.cuh",
        "words[3] = loaded.w ^ sign",
        "words[3] = loaded.w",
        f"{ATTENTION} -k 'cuda and scale'",
    ),
    Fault(
        "attention of long images: values go on by the stride of the keys",
        "csrc/cuda/compact_attention.cu",
        "head.v += Traits::kKeys * p.v.row_stride;",
        "head.v += Traits::kKeys * p.k.row_stride;",
        f"{ATTENTION} -k 'cuda and values'",
    ),
    Fault(
        "prune_attention in one launch: rows of no image are marked by the size of the indices",
        "csrc/cuda/prune_attention.cu",
        "fill_with_no_row(p.indices, end, size, p.total);",
        "fill_with_no_row(p.indices, end, size, size);",
        f"{TAIL} -k 'cuda and prune'",
    ),
    Fault(
        "select: ties that are not kept leave gaps",
        "csrc/cuda/select_rows.cuh",
        "+ min(ties_here, ties)] = first + token;",
        "+ ties_here] = first + token;",
        f"{SELECT} -k 'cuda and (equal or like)'",
    ),
    Fault(
        "select_mass of images for several warps: weights go where the last exchange is still read",
        "csrc/cuda/select_rows.cuh",
        "scratch.weights[half ^ 1][warp] = sum.weight;",
        "scratch.weights[half][warp] = sum.weight;",
        f"{SELECT} -k 'cuda and mass'",
    ),
    Fault(
        "cls_value: the sum that is shared out leaves out one row, whatever the prefix",
        "csrc/cuda/class_scores.cuh",
        "return j < num_prefix ? 0.f : scores[j];",
        "return j < 1 ? 0.f : scores[j];",
        f"{SCORE} -k 'cuda and prefix'",
    ),
    Fault(
        "column scores: a head dimension that a tile's width does not divide goes on in the next head",
        "csrc/cuda/score_columns.cuh",
        "const bool valid = first + row < n && chunk + c < chunks;",
        "const bool valid = first + row < n;",
        f"{SCORE} -k 'cuda and column'",
    ),
    Fault(
        "cls scores: of more heads than a block takes at once the last ones alone count",
        "csrc/cuda/score_tokens.cu",
        "float sum = first == 0 ? logits[j] : scores[j] + logits[j];",
        "float sum = logits[j];",
        f"{SCORE} -k 'cuda and heads'",
    ),
    Fault(
        "gather: 16 bytes are moved at once, whatever the stride",
        "csrc/cuda/gather_tokens.cu",
        "bits_of(p.x, p.out, p.row_bytes, p.x_row_stride)",
        "bits_of(p.x, p.out, p.row_bytes)",
        f"{GATHER} -k 'cuda and test_gather'",
    ),
    Fault(
        "gather_add_norm: an index that is no row is read",
        "csrc/cuda/gather_add_norm.cu",
        "index < p.total",
        "index <= p.total",
        f"{TAIL} -k 'cuda and (norm or row)'",
    ),
    Fault(
        "rotate: a thread with several heads takes the first one's table for all",
        "csrc/cuda/rotate.cu",
        "if (!shared) load_entry(head);",
        "if (!shared && head == blockIdx.y) load_entry(head);",
        "tests/emulation/test_emulated_launches.py -k rotate",
    ),
    Fault(
        "offsets behind a shorter image: its prefix rows are not counted",
        "csrc/cuda/keep_rows.cuh",
        "sum += n - patches + (patches > 0 ?",
        "sum += (patches > 0 ?",
        f"{TAIL} -k 'cuda and (select or count or equal)'",
    ),
    Fault(
        "offsets of more than 128 images: a group's own rows are not passed on",
        "csrc/cuda/keep_rows.cuh",
        "publish(published.starts + group + 1, sum + length);",
        "publish(published.starts + group + 1, sum);",
        f"{SELECT} -k 'cuda and group'",
    ),
)
