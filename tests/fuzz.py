"""Random calls of the public ops: ``python fuzz.py SEED CALLS``.

Each call starts from good arguments and changes up to three of them. Whether the result is still legal is known: some
changes never are (a type, a rank, a stranger in place of a tensor), and for the others ``fits`` tells from the values.
A legal call has to succeed and agree with the reference; any other has to raise an exception that names the op.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from helpers import cu_of
from legality import HEADS, INTO, OFFSETS, ROWS, VECTORS, Arguments, fits, selection_fits
from torch import Tensor

import sait_kernels as sk
from sait_kernels import library

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OTHER_DTYPES = (torch.float64, torch.int32, torch.int64, torch.bool, torch.complex64, torch.uint8)
STRANGERS = ("x", 3, 2.5, True, object(), {}, b"", torch.float32, lambda: None)
INT32 = 2**31 - 1


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def good(rng: random.Random, op: str) -> Arguments:
    dtype, num_prefix = rng.choice(KERNEL_DTYPES), rng.randint(0, 3)
    lengths = [rng.choice((0, rng.randint(max(1, num_prefix), 24))) for _ in range(rng.randint(0, 5))]
    cu, T, longest = cu_of(lengths), sum(lengths) + rng.choice((0, 0, 1, 9)), max(lengths, default=0)
    H, D, C = rng.randint(1, 3), rng.choice((8, 16, 40, 64)), rng.choice((1, 5, 16, 33))
    selection = sk.reference.select_topk(randn(T), cu, longest, keep=rng.choice((0.3, 1.0)), num_prefix=num_prefix)
    no_rows = torch.full((rng.choice((0, 0, 4)),), T, dtype=torch.int32)
    selection = selection._replace(indices=torch.cat([selection.indices, no_rows]))
    S = len(selection.indices)
    heads = {name: randn(T, H, D, dtype=dtype) for name in "qkv"}
    batch: Arguments = {"cu_seqlens": cu, "max_seqlen": longest + rng.choice((0, 0, 5))}
    kind = rng.choice(("cls", "column", "cls_value")) if num_prefix else "column"
    rule = rng.choice(({"keep": rng.choice((0.1, 0.45, 1.0))}, {"mass": rng.choice((0.2, 0.9, 1.0, 1))}))
    limits = {"min_keep": rng.randint(1, 3), "max_keep": rng.choice((None, 3, 9)), "static": rng.random() < 0.5}
    if op == "score_tokens":
        return {**heads, **batch, "kind": kind, "num_prefix": num_prefix, "scale": None}
    if op == "select_topk":
        return {"scores": randn(T), **batch, "keep": rng.choice((0.1, 0.45, 1.0)), "num_prefix": num_prefix}
    if op == "select_mass":
        return {"scores": randn(T).exp(), **batch, "mass": 0.7, "num_prefix": num_prefix, **limits}
    if op == "compact_attention":
        bias = rng.choice((None, randn(T)))
        return {**heads, **batch, "selection": rng.choice((None, selection)), "scale": None, "key_bias": bias}
    if op == "prune_attention":
        limits = limits if "mass" in rule else {}
        return {**heads, **batch, **rule, **limits, "kind": kind, "num_prefix": num_prefix, "scale": None}
    if op == "gather_tokens":
        return {"x": randn(T, C, dtype=dtype), "selection": selection}
    if op == "scatter_tokens":
        base = rng.choice((None, randn(T, C, dtype=dtype)))
        return {"y": randn(S, C, dtype=dtype), "selection": selection, "total": T, "base": base}
    if op == "rotate":
        table = randn(9, 2 * D) if rng.random() < 0.5 else randn(9, H, 2 * D).transpose(0, 1)
        positions = torch.randint(-1, 9, (T,), dtype=torch.int32)
        return {"q": heads["q"], "k": heads["k"], "positions": positions, "table": table, "pairs": rng.random() < 0.5}
    if op == "merge_tokens":
        rows = int(cu[-1])
        target = torch.randint(-1, max(rows, 1), (T,), dtype=torch.int32).clamp_max(rows - 1)
        offsets: Arguments = {"cu_seqlens_out": cu, "max_seqlen_out": batch["max_seqlen"]}
        total = rng.choice((None, rows, rows + 3))
        return {"x": randn(T, C, dtype=dtype), "target": target, "weight": randn(T), **offsets, "total": total}
    vectors = {name: randn(C, dtype=rng.choice(KERNEL_DTYPES)) for name in ("weight", "bias", "gamma")}
    rows = {"x": randn(T, C, dtype=dtype), "y": randn(S, C, dtype=dtype)}
    return {**rows, "selection": selection, **vectors, "eps": 1e-6}


OPS = (
    "score_tokens",
    "select_topk",
    "select_mass",
    "compact_attention",
    "prune_attention",
    "gather_tokens",
    "scatter_tokens",
    "gather_add_norm",
    "merge_tokens",
    "rotate",
)


def plain_names(arguments: Arguments, among: tuple[str, ...] | None = None) -> list[str]:
    """The arguments that are tensors as they come, on the CPU and strided."""
    return [
        name
        for name, value in arguments.items()
        if isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and (among is None or name in among)
    ]


def float_names(arguments: Arguments) -> list[str]:
    return [name for name in plain_names(arguments) if arguments[name].is_floating_point()]


def at_most_one(rng: random.Random, names: list[str]) -> list[str]:
    return rng.sample(names, min(1, len(names)))


def change_to_stranger(rng: random.Random, op: str, arguments: Arguments) -> bool:
    every = (*HEADS, *ROWS, *VECTORS, "scores", *OFFSETS, *INTO, "selection", "table", "key_bias")
    names = [name for name in every if name in arguments]
    for name in at_most_one(rng, names):
        arguments[name] = rng.choice(STRANGERS)
    return not names


def change_to_none(rng: random.Random, op: str, arguments: Arguments) -> bool:
    name = rng.choice(list(arguments))
    optional = {"scale", "base", "gamma", "max_keep", "key_bias"}
    optional |= {"compact_attention": {"selection"}, "merge_tokens": {"total"}}.get(op, set())
    legal = name in optional or arguments[name] is None or (op == "score_tokens" and name == "v")
    arguments[name] = None
    return legal or (op == "prune_attention" and name in ("keep", "mass"))  # of these two, ``fits`` judges


def change_rank(rng: random.Random, op: str, arguments: Arguments) -> bool:
    for name in at_most_one(rng, plain_names(arguments)):
        value = arguments[name]
        arguments[name] = rng.choice((value.unsqueeze(0), value.unsqueeze(-1)))
        return name == "table"  # of a table for each head ``fits`` judges
    return True


def change_dtype(rng: random.Random, op: str, arguments: Arguments) -> bool:
    names = [name for name in plain_names(arguments) if not arguments[name].is_complex()]
    if not names:
        return True
    name, dtype = rng.choice(names), rng.choice((*KERNEL_DTYPES, *OTHER_DTYPES))
    value = arguments[name]
    arguments[name] = value.to(dtype)
    if name == "positions":
        return dtype in (torch.int32, torch.int64)
    # Of one floating-point type for another, ``fits`` judges: it depends on the other arguments.
    several = value.is_floating_point() and name not in ("scores", "key_bias")
    return dtype == value.dtype or (dtype in KERNEL_DTYPES and several)


def change_device(rng: random.Random, op: str, arguments: Arguments) -> bool:
    for name in at_most_one(rng, plain_names(arguments)):
        arguments[name] = arguments[name].to("meta")
        return False
    return True


def change_layout(rng: random.Random, op: str, arguments: Arguments) -> bool:
    for name in at_most_one(rng, plain_names(arguments)):
        arguments[name] = arguments[name].to_sparse()
        return False
    return True


def change_size(rng: random.Random, op: str, arguments: Arguments) -> bool:
    """One more along one dimension of one tensor; ``fits`` judges."""
    for name in at_most_one(rng, plain_names(arguments)):
        value = arguments[name]
        if value.numel():
            dim = rng.randrange(value.dim())
            arguments[name] = torch.cat([value, torch.zeros_like(value.narrow(dim, 0, 1))], dim)
    return True


def change_inner_stride(rng: random.Random, op: str, arguments: Arguments) -> bool:
    """``fits`` judges: a later change may copy."""
    for name in at_most_one(rng, plain_names(arguments)):
        value = arguments[name]
        if value.numel():
            arguments[name] = torch.stack([value, value], -1).flatten(-2)[..., ::2]
    return True


def change_outer_stride(rng: random.Random, op: str, arguments: Arguments) -> bool:
    """Still the same numbers: every other row of a larger tensor, at an odd offset."""
    for name in plain_names(arguments, (*HEADS, *ROWS)):
        if arguments[name].dim() > 1 and arguments[name].is_contiguous():
            arguments[name] = arguments[name].repeat_interleave(2, 0)[1::2]
    return True


def change_expanded_heads(rng: random.Random, op: str, arguments: Arguments) -> bool:
    for name in plain_names(arguments, (rng.choice(HEADS),)):
        if arguments[name].dim() == 3:
            arguments[name] = arguments[name][:, :1].expand_as(arguments[name])
    return True


def change_to_view(rng: random.Random, op: str, arguments: Arguments) -> bool:
    """The negative bit, a parameter, a tensor that wants a gradient: still tensors."""
    for name in float_names(arguments):
        value = arguments[name].detach()
        arguments[name] = rng.choice(
            (torch._neg_view(-value), torch.nn.Parameter(value), value.clone().requires_grad_(), value)
        )
    return True


def change_values(rng: random.Random, op: str, arguments: Arguments) -> bool:
    for name in at_most_one(rng, float_names(arguments)):
        value = arguments[name].detach().clone()
        special = rng.choice((math.nan, math.inf, -math.inf, 0.0, -0.0))
        value[torch.rand(value.shape) < rng.choice((0.05, 1.0))] = special
        arguments[name] = value
    return True


def change_offsets(rng: random.Random, op: str, arguments: Arguments) -> bool:
    """``fits`` judges the values."""
    for name in plain_names(arguments, OFFSETS):
        value = arguments[name]
        if value.dtype == torch.int32 and value.dim() == 1 and len(value):
            value = value.clone()
            value[rng.randrange(len(value))] = rng.choice((0, -1, 1, 2, 5, 9, 30, 1000, INT32, -INT32 - 1))
            arguments[name] = value[: rng.choice((len(value), len(value), 1, 0))]
    return True


def change_positions(rng: random.Random, op: str, arguments: Arguments) -> bool:
    """``fits`` judges the values."""
    for name in plain_names(arguments, INTO):
        value = arguments[name]
        if value.dtype == torch.int32 and value.dim() == 1 and len(value):
            arguments[name] = value = value.clone()
            value[rng.randrange(len(value))] = rng.choice((-1, 0, 5, 8, 9, -2, INT32, -INT32 - 1))
    return True


def change_selection(rng: random.Random, op: str, arguments: Arguments) -> bool:
    selection = arguments.get("selection")
    plain = isinstance(selection, sk.Selection) and isinstance(selection.indices, Tensor)
    if not plain or selection.indices.dtype != torch.int32 or selection.indices.device.type != "cpu":
        return True
    what = rng.choice(("indices", "indices", "order", "dtype", "stranger", "shorter", "offsets", "meta", "rank"))
    indices = selection.indices.clone()
    if what == "indices" and len(indices):
        indices[rng.randrange(len(indices))] = rng.choice((-1, 0, 1, 3, 20, 100, INT32, -INT32 - 1))
    elif what == "order":
        indices = indices.flip(0)
    elif what == "shorter":
        indices = indices[: rng.randint(0, len(indices))]
    elif what == "dtype":
        arguments["selection"] = selection._replace(indices=indices.to(rng.choice((torch.int64, torch.float32))))
        return False
    elif what == "meta":
        arguments["selection"] = selection._replace(indices=indices.to("meta"))
        return False
    elif what == "rank":
        arguments["selection"] = selection._replace(indices=indices[None])
        return False
    elif what == "stranger":
        arguments["selection"] = selection._replace(indices=rng.choice((None, "x", object())))
        return False
    elif what == "offsets":
        kept = selection.cu_seqlens.clone()
        kept[rng.randrange(len(kept))] = rng.choice((-1, 0, 1, 3, 100, INT32))
        selection = selection._replace(cu_seqlens=kept)
    arguments["selection"] = selection._replace(indices=indices)
    return True


def change_number(rng: random.Random, op: str, arguments: Arguments) -> bool:
    """``fits`` judges the values that are numbers."""
    values: dict[str, tuple[Any, ...]] = {
        "max_seqlen": (-1, 0, 1, 7, 24, 29, 2**40, 2**62, -(2**63)),
        "max_seqlen_out": (-1, 0, 1, 7, 24, 29, 2**40, 2**62, -(2**63)),
        "num_prefix": (-1, 0, 1, 2, 5, 25, INT32, 2**40, -(2**63)),
        "keep": (0.0, 1e-9, 0.5, 1.0, 1.0 + 1e-9, -0.5, math.nan, math.inf, 0, 1, 2, 24, -1, 2**40),
        "mass": (0.0, 1e-9, 0.5, 1.0, 1.0 + 1e-9, -0.5, math.nan, math.inf, 0, 1, 2, -1),
        "scale": (0.0, 1e-30, 0.1, -0.3, math.nan, math.inf, -math.inf),
        "eps": (1e-12, 1e-3, 0.0, -1e-6, math.nan, math.inf),
        "total": (-1, 0, 1, 7, 25, 100, -(2**63)),
        "min_keep": (-1, 0, 1, 5, 2**40),
        "max_keep": (-1, 0, 1, 5, 2**40),
        "kind": ("cls", "column", "cls_value", "CLS", "", "cls "),
    }
    names = [name for name in arguments if name in values]
    if not names:
        return True
    name = rng.choice(names)
    if rng.random() < 0.2:
        strangers: list[Any] = [object(), [1], {}, b"x", torch.zeros(2)]
        strangers += [] if name == "kind" else ["x"]
        strangers += [] if name in ("mass", "scale", "eps") else [2**70]
        arguments[name] = rng.choice(strangers)
        return False
    arguments[name] = rng.choice(values[name])
    return True


CHANGES: tuple[Callable[[random.Random, str, Arguments], bool], ...] = (
    change_to_stranger,
    change_to_none,
    change_rank,
    change_dtype,
    change_device,
    change_layout,
    change_size,
    change_inner_stride,
    change_outer_stride,
    change_expanded_heads,
    change_to_view,
    change_values,
    change_offsets,
    change_offsets,
    change_positions,
    change_selection,
    change_selection,
    change_number,
    change_number,
)


def check_result(op: str, arguments: Arguments, result: Any) -> None:
    """The reference's result; where a value is not finite, which NaN comes out where is nobody's promise."""
    floats = [arguments[name] for name in float_names(arguments)]
    finite = all(t.isfinite().all() for t in floats)
    if op.startswith("select"):
        want = getattr(sk.reference, op)(**arguments)
        assert result.indices.tolist() == want.indices.tolist()
        assert result.cu_seqlens.tolist() == want.cu_seqlens.tolist()
        return
    if op == "prune_attention":  # the choice may differ where scores are equal but for rounding; its form may not
        result, selection = result
        names = ("q", "k", "v", "cu_seqlens", "max_seqlen")
        arguments = {name: arguments[name] for name in (*names, "scale")} | {"selection": selection}
        assert selection_fits("compact_attention", arguments)
        op = "compact_attention"
    with sk.backend("reference"):
        want = getattr(sk, op)(**arguments)
    for got, expected in zip(*((r if isinstance(r, tuple) else (r,)) for r in (result, want)), strict=True):
        assert got.shape == expected.shape
        assert got.dtype == expected.dtype
        if finite:
            loose = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}[got.dtype]
            torch.testing.assert_close(got.float(), expected.float(), rtol=loose, atol=loose, equal_nan=True)
    wanted = [t for t in floats if t.requires_grad]
    outputs = [t for t in (result if isinstance(result, tuple) else (result,)) if t.requires_grad]
    if wanted and outputs:
        grads = torch.autograd.grad([t.float().sum() for t in outputs], wanted, allow_unused=True)
        for tensor, grad in zip(wanted, grads, strict=True):
            assert grad is None or grad.shape == tensor.shape


def describe(value: Any) -> str:
    if isinstance(value, sk.Selection):
        return f"Selection({', '.join(map(describe, value))})"
    if isinstance(value, Tensor):
        form = f"{str(value.dtype)[6:]}{tuple(value.shape)} {value.device.type}"
        small = value.dtype == torch.int32 and value.device.type == "cpu" and value.layout == torch.strided
        return f"{form} {value.tolist()}" if small else form
    return repr(value)


def call(op: str, arguments: Arguments, legal: bool) -> str | None:
    """What went wrong, or None."""
    try:
        legal = legal and fits(op, arguments)
        result = getattr(sk, op)(**arguments)
    except (ValueError, TypeError, RuntimeError) as error:
        if legal:
            return f"refused: {error}"
        return None if op in str(error) else f"the message does not name the op: {type(error).__name__}: {error}"
    except Exception as error:
        return f"raised {type(error).__name__}: {error}"
    if not legal:
        return "accepted"
    try:
        check_result(op, arguments, result)
    except AssertionError as error:
        return f"wrong: {error}"
    return None


def main(seed: int, calls: int) -> int:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is NaN, torch's and that of the ops
    assert library.module is not None, library.problem
    library.module.poison_memory(True)
    failures, legal_calls = [], 0
    for number in range(calls):
        op = rng.choice(OPS)
        arguments = good(rng, op)
        changes = [rng.choice(CHANGES) for _ in range(rng.randint(1, 3))]
        legal, untouched = True, dict(arguments)
        for change in changes:
            before = dict(untouched)
            legal = (not untouched or change(rng, op, untouched)) and legal
            arguments |= untouched
            # What one change made illegal, no other one may make good.
            untouched = {name: value for name, value in untouched.items() if value is before[name]}
        line = f"{number} {op}({', '.join(f'{name}={describe(value)}' for name, value in arguments.items())})"
        print(line, flush=True)  # the last line tells what crashed
        legal_calls += legal
        problem = call(op, arguments, legal)
        if problem:
            failures.append(f"{line}\n    changes: {', '.join(c.__name__ for c in changes)}\n    {problem}")
    print(f"{calls} calls, {legal_calls} of legal form, {len(failures)} failures", *failures[:12], sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
