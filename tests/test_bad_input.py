"""A bad argument ends in a Python exception that names op, argument, what was expected, what came, and the cure."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import cu_of, randn, run_python
from tiers import full_only
from torch import Tensor

import sait_kernels as sk

LENGTHS = (6, 0, 4)
T, H, D, C, S = 10, 2, 16, 32, 6
INDICES = (0, 2, 5, 6, 8, 9)


def selection(indices: Any = INDICES, offsets: Any = (0, 3, 3, 6), dtype: torch.dtype = torch.int32) -> sk.Selection:
    return sk.Selection(torch.tensor(indices, dtype=dtype), torch.tensor(offsets, dtype=torch.int32), 3)


def heads() -> Tensor:
    return randn(T, H, D)


def positions(*changed: int) -> Tensor:
    return torch.tensor([*changed, *[-1, *range(9)][len(changed) :]], dtype=torch.int32)


def batch() -> dict[str, Any]:
    return {"cu_seqlens": cu_of(LENGTHS), "max_seqlen": 6}


GOOD: dict[str, Callable[[], dict[str, Any]]] = {
    "score_tokens": lambda: {"q": heads(), "k": heads(), **batch()},
    "select_topk": lambda: {"scores": randn(T), **batch(), "keep": 0.5},
    "select_mass": lambda: {"scores": randn(T), **batch(), "mass": 0.5},
    "compact_attention": lambda: {
        "q": heads(),
        "k": heads(),
        "v": heads(),
        **batch(),
        "selection": selection(),
        "key_bias": randn(T),
    },
    "prune_attention": lambda: {"q": heads(), "k": heads(), "v": heads(), **batch(), "keep": 0.5},
    "gather_tokens": lambda: {"x": randn(T, C), "selection": selection()},
    "scatter_tokens": lambda: {"y": randn(S, C), "selection": selection(), "total": T, "base": randn(T, C)},
    "gather_add_norm": lambda: {
        "x": randn(T, C),
        "y": randn(S, C),
        "selection": selection(),
        "weight": randn(C),
        "bias": randn(C),
        "eps": 1e-6,
        "gamma": randn(C),
    },
    "merge_tokens": lambda: {
        "x": randn(T, C),
        "target": positions(),
        "weight": randn(T),
        "cu_seqlens_out": cu_of(LENGTHS),
        "max_seqlen_out": 6,
        "total": 12,
    },
    "rotate": lambda: {"q": heads(), "k": heads(), "positions": positions(), "table": randn(9, 2 * D)},
}
PACKED = ("score_tokens", "select_topk", "select_mass", "compact_attention", "prune_attention")
ATTENTION = ("score_tokens", "compact_attention", "prune_attention")
SELECTED = ("compact_attention", "gather_tokens", "scatter_tokens", "gather_add_norm")


@pytest.mark.parametrize("op", GOOD)
def test_the_good_arguments_are_good(op: str) -> None:
    getattr(sk, op)(**GOOD[op]())


def bad(op: str, argument: str, value: Any, error: type[Exception], *words: str, named: str | None = None) -> Any:
    """A call with one argument changed; ``named`` is what the message calls it, where that is another name."""
    label = re.sub(r"[^\w.,<>=-]+", " ", " ".join(words))[:40]
    return pytest.param(op, argument, value, error, named or argument, words, id=f"{op}-{named or argument}-{label}")


def bad_heads(op: str) -> list[Any]:
    others = ("k",) if op == "score_tokens" else ("k", "v")
    cases = [
        bad(op, "q", randn(T, C), ValueError, "(T, H, D)", "(10, 32)"),
        bad(op, "q", randn(2, 5, H, D), ValueError, "(T, H, D)", "(2, 5, 2, 16)"),
        bad(op, "q", heads().long(), TypeError, "float32, bfloat16 or float16", "Long"),
        bad(op, "q", heads().double(), TypeError, "float32, bfloat16 or float16", "Double", "reference"),
        bad(op, "q", randn(T, 0, D), ValueError, "one head", "(10, 0, 16)"),
        bad(op, "q", randn(T, H, 12), ValueError, "multiple of 8", "12"),
        bad(op, "q", randn(T, H, 0), ValueError, "multiple of 8", "0"),
        bad(op, "q", randn(T, H, 264), ValueError, "from 8 to 256", "264"),
        bad(op, "q", randn(T, D, H).transpose(1, 2), ValueError, "contiguous last dimension", "stride 2"),
        bad(op, "q", randn(T, H, 2 * D)[..., ::2], ValueError, "contiguous last dimension", "stride 2"),
        bad(op, "scale", float("nan"), ValueError, "finite", "nan"),
        bad(op, "scale", float("inf"), ValueError, "finite", "inf"),
        bad(op, "scale", 1e300, ValueError, "finite", "1e+300"),
    ]
    for name in others:
        cases += [
            bad(op, name, randn(T, C), ValueError, "(10, 2, 16) as q", "(10, 32)"),
            bad(op, name, randn(T - 1, H, D), ValueError, "(10, 2, 16) as q", "(9, 2, 16)"),
            bad(op, name, randn(T, H + 1, D), ValueError, "(10, 2, 16) as q", "(10, 3, 16)"),
            bad(op, name, randn(T, H, D + 8), ValueError, "(10, 2, 16) as q", "(10, 2, 24)"),
            bad(op, name, heads().half(), TypeError, "dtype Float as q", "Half"),
            bad(op, name, randn(T, D, H).transpose(1, 2), ValueError, "contiguous last dimension", "stride 2"),
            bad(op, name, torch.empty(T, H, D, device="meta"), ValueError, "device cpu", "meta"),
        ]
    return cases


def bad_offsets(op: str, which: str = "") -> list[Any]:
    """``which``: behind the names of the offsets and of their bound."""
    offsets, bound = f"cu_seqlens{which}", f"max_seqlen{which}"

    def cu(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    return [
        bad(op, offsets, cu_of(LENGTHS).long(), TypeError, "int32", "Long"),
        bad(op, offsets, cu_of(LENGTHS).float(), TypeError, "int32", "Float"),
        bad(op, offsets, cu_of(LENGTHS)[None], ValueError, "1-D", "(1, 4)"),
        bad(op, offsets, torch.tensor(0, dtype=torch.int32), ValueError, "1-D", "()"),
        bad(op, offsets, cu(0, 9, 6, 9, 6, 9, 10)[::2], ValueError, "contiguous", "stride 2"),
        bad(op, offsets, cu(), ValueError, "(B + 1,) offsets", "(0,)"),
        bad(op, offsets, cu(1, 6, 10), ValueError, "first value of 0", "1"),
        bad(op, offsets, cu(-1, 6, 10), ValueError, "first value of 0", "-1"),
        bad(op, offsets, cu(0, 6, 4, 10), ValueError, "ascending", "-2 at image 1"),
        bad(op, offsets, cu(0, 6, -4, 10), ValueError, "ascending", "-10 at image 1"),
        bad(op, offsets, cu(0, 2**31 - 1, -(2**31), 10), ValueError, f"at least {2**31 - 1}", named=bound),
        bad(op, offsets, torch.empty(4, dtype=torch.int32, device="meta"), ValueError, "device cpu", "meta"),
        bad(op, bound, 5, ValueError, "at least 6, the length of image 0", "5"),
        bad(op, bound, 0, ValueError, "at least 6", "0"),
        bad(op, bound, -1, ValueError, ">= 0", "-1"),
    ]


def bad_prefix(op: str) -> list[Any]:
    return [
        bad(op, "num_prefix", 5, ValueError, "at most 4, the length of image 2", "5"),
        bad(op, "num_prefix", -1, ValueError, ">= 0", "-1"),
        bad(op, "num_prefix", 2**40, ValueError, "at most 6", str(2**40)),
    ]


def bad_kind(op: str) -> list[Any]:
    return [
        bad(op, "kind", "class", ValueError, "'cls', 'column', 'cls_value'", "'class'"),
        bad(op, "kind", "", ValueError, "'cls', 'column', 'cls_value'", "''"),
        bad(op, "num_prefix", 0, ValueError, "at least 1 for kind 'cls'", "0", "kind='column'"),
    ]


def bad_keep(op: str) -> list[Any]:
    return [
        *(bad(op, "keep", value, ValueError, "(0, 1]", repr(value)) for value in (0.0, -0.1, 1.0001, 55.0)),
        *(bad(op, "keep", value, ValueError, "(0, 1]", repr(value)) for value in (float("nan"), float("inf"))),
        *(bad(op, "keep", value, ValueError, ">= 1", repr(value)) for value in (0, -3)),
        bad(op, "keep", 4, ValueError, "at most 3, the patches of image 2", "4"),
        bad(op, "keep", 2**40, ValueError, "at most 5, the patches of image 0", str(2**40)),
        *(bad(op, "keep", value, TypeError, "float in (0, 1]", repr(value)) for value in ("half", True, [0.5])),
    ]


def bad_mass(op: str) -> list[Any]:
    return [
        *(bad(op, "mass", value, ValueError, "(0, 1]", repr(value)) for value in (0.0, -0.1, 1.0001, 2, 0)),
        *(bad(op, "mass", value, ValueError, "(0, 1]", repr(value)) for value in (float("nan"), float("inf"))),
        *(bad(op, "mass", value, TypeError, "(0, 1]", repr(value)) for value in ("most", True, [0.5])),
    ]


def bad_selection(op: str) -> list[Any]:
    def with_indices(*rows: int) -> sk.Selection:
        return selection(rows)

    indices = "selection.indices"
    cases = [
        bad(op, "selection", with_indices(0, 2, 5, 6, 8, 11), ValueError, "[0, 10)", "11 at position 5", named=indices),
        bad(op, "selection", with_indices(-1, 2, 5, 6, 8, 9), ValueError, "[0, 10)", "-1 at position 0", named=indices),
        bad(op, "selection", with_indices(0, 2, 5, 10, 8, 9), ValueError, "ascending", "8 after 10", named=indices),
        bad(op, "selection", with_indices(0, 2, 5, 10, 10, 9), ValueError, "ascending", "9 after 10", named=indices),
        bad(op, "selection", with_indices(0, 2, 2, 6, 8, 9), ValueError, "ascending", "2 after 2", named=indices),
        bad(op, "selection", with_indices(2, 0, 5, 6, 8, 9), ValueError, "ascending", "0 after 2", named=indices),
        bad(op, "selection", selection(dtype=torch.int64), TypeError, "int32", "Long", named=indices),
        bad(op, "selection", selection([INDICES]), ValueError, "1-D", "(1, 6)", named=indices),
        bad(
            op,
            "selection",
            selection([i for i in INDICES for _ in range(2)])._replace(
                indices=torch.tensor([i for i in INDICES for _ in range(2)], dtype=torch.int32)[::2]
            ),
            ValueError,
            "contiguous",
            "stride 2",
            named=indices,
        ),
        bad(
            op,
            "selection",
            selection()._replace(indices=torch.empty(S, dtype=torch.int32, device="meta")),
            ValueError,
            "device cpu",
            "meta",
            named=indices,
        ),
        *(bad(op, "selection", value, TypeError, "Selection", type(value).__name__) for value in (7, "all", [0, 2])),
        bad(op, "selection", torch.tensor(INDICES).int(), TypeError, "Selection", "Tensor"),
    ]
    if op != "compact_attention":
        cases.append(bad(op, "selection", None, TypeError, "Selection", "NoneType"))
    return cases


def bad_rows(op: str, name: str) -> list[Any]:
    rows = S if name == "y" else T
    return [
        bad(op, name, randn(rows), ValueError, "(T, C)", f"({rows},)"),
        bad(op, name, randn(rows, 2, C), ValueError, "(T, C)", f"({rows}, 2, 32)"),
        bad(op, name, randn(rows, C).int(), TypeError, "float32, bfloat16 or float16", "Int"),
        bad(op, name, randn(rows, 2 * C)[:, ::2], ValueError, "contiguous last dimension", "stride 2"),
    ]


CASES = [
    *(case for op in ATTENTION for case in bad_heads(op)),
    *(case for op in PACKED for case in bad_offsets(op)),
    *(
        bad(op, "cu_seqlens", cu_of((6, 5)), ValueError, "last value of at most 10, the number of rows", "11")
        for op in PACKED
    ),
    *(case for op in PACKED if op != "compact_attention" for case in bad_prefix(op)),
    *(case for op in ("score_tokens", "prune_attention") for case in bad_kind(op)),
    *(case for op in ("select_topk", "prune_attention") for case in bad_keep(op)),
    *bad_mass("select_mass"),
    *(case for op in SELECTED for case in bad_selection(op)),
    *bad_rows("gather_tokens", "x"),
    *bad_rows("scatter_tokens", "y"),
    *bad_rows("gather_add_norm", "x"),
    *bad_rows("gather_add_norm", "y"),
    bad("score_tokens", "kind", "cls_value", ValueError, "values", "None", named="v"),
    bad("select_mass", "min_keep", 0, ValueError, ">= 1", "0"),
    bad("select_mass", "min_keep", None, TypeError, "whole number", "None"),
    bad("select_mass", "min_keep", 1.5, TypeError, "whole number", "1.5"),
    bad("select_mass", "max_keep", 0, ValueError, "at least min_keep = 1", "0"),
    bad("select_mass", "max_keep", "few", TypeError, "whole number", "'few'"),
    *(bad(op, "static", 1, TypeError, "True or False", "1") for op in ("select_mass", "prune_attention")),
    *(
        bad("prune_attention", name, value, ValueError, "with min_keep, max_keep or static", "None", named="mass")
        for name, value in (("min_keep", 2), ("max_keep", 9), ("static", True))
    ),
    *(
        case
        for op in ("select_topk", "select_mass")
        for case in (
            bad(op, "scores", randn(2, 5), ValueError, "(T,)", "(2, 5)"),
            bad(op, "scores", randn(T).half(), TypeError, "float32", "Half"),
            bad(op, "scores", randn(T).double(), TypeError, "float32", "Double"),
            bad(op, "scores", randn(T).long(), TypeError, "float32", "Long"),
            bad(op, "scores", randn(T - 1), ValueError, "last value of at most 9", "10", named="cu_seqlens"),
        )
    ),
    bad(
        "compact_attention",
        "selection",
        selection(offsets=(0, 3, 6)),
        ValueError,
        "(B + 1,) = 4",
        "3",
        named="selection.cu_seqlens",
    ),
    *(
        bad(
            "compact_attention", "selection", selection(offsets=offsets), ValueError, *words, named=f"selection.{named}"
        )
        for offsets, named, *words in (
            ((0, 3, 3, 5), "cu_seqlens", "from 0 to 6", "0 to 5"),
            ((1, 3, 3, 6), "cu_seqlens", "from 0 to 6", "1 to 6"),
            ((0, 3, 2, 6), "cu_seqlens", "ascending", "3 before 2"),
            ((0, 2, 2, 6), "indices", "[6, 10) for image 2", "5 to 9"),
            ((0, 3, 4, 6), "indices", "[6, 6) for image 1", "6 to 6"),
        )
    ),
    bad(
        "compact_attention",
        "selection",
        selection((0, 2, 5, 6, 8, 10)),
        ValueError,
        "from 0 to 5, the rows",
        "0 to 6",
        named="selection.cu_seqlens",
    ),
    bad("compact_attention", "key_bias", randn(T - 1), ValueError, "(10,), one value for each row of k", "(9,)"),
    bad("compact_attention", "key_bias", randn(T, 1), ValueError, "(10,), one value for each row of k", "(10, 1)"),
    bad("compact_attention", "key_bias", randn(H, T), ValueError, "(10,), one value for each row of k", "(2, 10)"),
    bad("compact_attention", "key_bias", torch.tensor(0.0), ValueError, "(10,), one value for each row of k", "()"),
    *(
        bad("compact_attention", "key_bias", randn(T).to(dtype), TypeError, "float32", name, ".float()")
        for dtype, name in ((torch.float16, "Half"), (torch.bfloat16, "BFloat16"), (torch.float64, "Double"))
    ),
    bad("compact_attention", "key_bias", torch.ones(T, dtype=torch.bool), TypeError, "float32", "Bool"),
    bad("compact_attention", "key_bias", torch.empty(T, device="meta"), ValueError, "device cpu", "meta"),
    bad("scatter_tokens", "total", 8, ValueError, "[0, 8)", "9 at position 5", named="selection.indices"),
    bad("scatter_tokens", "total", -1, ValueError, ">= 0", "-1"),
    bad("scatter_tokens", "y", randn(S - 1, C), ValueError, "5", "6", named="selection.indices"),
    bad("scatter_tokens", "base", randn(T, C - 1), ValueError, "(10, 32)", "(10, 31)"),
    bad("scatter_tokens", "base", randn(T - 1, C), ValueError, "(10, 32)", "(9, 32)"),
    bad("scatter_tokens", "base", randn(T, C).half(), TypeError, "Float as y", "Half"),
    bad("scatter_tokens", "base", torch.empty(T, C, device="meta"), ValueError, "device cpu", "meta"),
    bad("gather_add_norm", "y", randn(S + 1, C), ValueError, "6 rows", "(7, 32)"),
    bad("gather_add_norm", "y", randn(S, C + 1), ValueError, "32 channels", "(6, 33)"),
    bad("gather_add_norm", "y", torch.empty(S, C, device="meta"), ValueError, "device cpu", "meta"),
    *(
        case
        for name in ("weight", "bias", "gamma")
        for case in (
            bad("gather_add_norm", name, randn(C + 1), ValueError, "(32,)", "(33,)"),
            bad("gather_add_norm", name, randn(1, C), ValueError, "(32,)", "(1, 32)"),
            bad("gather_add_norm", name, randn(C).int(), TypeError, "float32", "Int"),
            bad("gather_add_norm", name, torch.empty(C, device="meta"), ValueError, "device cpu", "meta"),
        )
    ),
    *bad_rows("merge_tokens", "x"),
    *bad_offsets("merge_tokens", "_out"),
    bad("merge_tokens", "x", randn(T, C).double(), TypeError, "float32, bfloat16 or float16", "Double", "reference"),
    bad("merge_tokens", "x", randn(1, C).expand(2**31, C), ValueError, "fewer than 2^31", str(2**31)),
    bad("merge_tokens", "x", randn(T - 1, C), ValueError, "9, one for each row of x", "10", named="target"),
    bad("merge_tokens", "target", positions()[1:], ValueError, "10, one for each row of x", "9"),
    bad("merge_tokens", "target", positions()[None], ValueError, "1-D", "(1, 10)"),
    bad("merge_tokens", "target", positions().long(), TypeError, "int32", "Long"),
    bad("merge_tokens", "target", positions().repeat_interleave(2)[::2], ValueError, "contiguous", "stride 2"),
    bad("merge_tokens", "target", positions(0, 10), ValueError, "[0, 10), or -1", "10 at row 1"),
    bad("merge_tokens", "target", positions(0, 11), ValueError, "[0, 10), or -1", "11 at row 1"),
    bad("merge_tokens", "target", positions(0, 1, -2), ValueError, "[0, 10), or -1", "-2 at row 2"),
    bad("merge_tokens", "target", positions().to("meta"), ValueError, "device cpu", "meta"),
    bad("merge_tokens", "weight", randn(T - 1), ValueError, "(10,), one for each row of x", "(9,)"),
    bad("merge_tokens", "weight", randn(T, 1), ValueError, "(10,)", "(10, 1)"),
    bad("merge_tokens", "weight", randn(T).half(), TypeError, "float32", "Half"),
    bad("merge_tokens", "weight", randn(T).double(), TypeError, "float32", "Double", ".float()"),
    bad("merge_tokens", "weight", torch.empty(T, device="meta"), ValueError, "device cpu", "meta"),
    bad("merge_tokens", "total", 9, ValueError, "at least 10, the last value of cu_seqlens_out", "9"),
    bad("merge_tokens", "total", -1, ValueError, ">= 0", "-1"),
    bad("rotate", "q", randn(T, C), ValueError, "(T, H, D)", "(10, 32)"),
    bad("rotate", "q", randn(2, 5, H, D), ValueError, "(T, H, D)", "(2, 5, 2, 16)"),
    bad("rotate", "q", heads().long(), TypeError, "float32, bfloat16 or float16", "Long"),
    bad("rotate", "q", heads().double(), TypeError, "float32, bfloat16 or float16", "Double", "reference"),
    bad("rotate", "q", randn(T, 0, D), ValueError, "one head", "(10, 0, 16)"),
    bad("rotate", "q", randn(T, H, 15), ValueError, "even", "15"),
    bad("rotate", "q", randn(T, H, 0), ValueError, "even", "0"),
    bad("rotate", "q", randn(T, D, H).transpose(1, 2), ValueError, "contiguous last dimension", "stride 2"),
    bad("rotate", "k", randn(T, C), ValueError, "(10, 2, 16) as q", "(10, 32)"),
    bad("rotate", "k", randn(T, H + 1, D), ValueError, "(10, 2, 16) as q", "(10, 3, 16)"),
    bad("rotate", "k", heads().half(), TypeError, "dtype Float as q", "Half"),
    bad("rotate", "k", randn(T, D, H).transpose(1, 2), ValueError, "contiguous last dimension", "stride 2"),
    bad("rotate", "k", torch.empty(T, H, D, device="meta"), ValueError, "device cpu", "meta"),
    bad("rotate", "positions", positions()[1:], ValueError, "10, one for each row", "9"),
    bad("rotate", "positions", positions()[None], ValueError, "1-D", "(1, 10)"),
    bad("rotate", "positions", positions().float(), TypeError, "int32", "Float"),
    bad("rotate", "positions", positions().repeat_interleave(2)[::2], ValueError, "contiguous", "stride 2"),
    bad("rotate", "positions", positions(0, 9), ValueError, "[0, 9), or -1", "9 at row 1"),
    bad("rotate", "positions", positions(0, 9).long(), ValueError, "[0, 9), or -1", "9 at row 1"),
    bad("rotate", "positions", positions(0, 1, -2), ValueError, "[0, 9), or -1", "-2 at row 2"),
    bad("rotate", "positions", positions().to("meta"), ValueError, "device cpu", "meta"),
    *(bad("rotate", "pairs", value, TypeError, "True or False", repr(value)) for value in (None, 1, "halves")),
    bad("rotate", "table", randn(9, D), ValueError, "(P, 32) or (2, P, 32)", "(9, 16)"),
    bad("rotate", "table", randn(3, 9, 2 * D), ValueError, "(P, 32) or (2, P, 32)", "(3, 9, 32)"),
    bad("rotate", "table", randn(2 * D), ValueError, "(P, 32) or (2, P, 32)", "(32,)"),
    bad("rotate", "table", randn(9, 2 * D).bfloat16(), TypeError, "float32", "BFloat16"),
    bad("rotate", "table", randn(9, 2 * D).double(), TypeError, "float32", "Double", ".float()"),
    bad("rotate", "table", randn(9, 4 * D)[:, ::2], ValueError, "contiguous last dimension", "stride 2"),
    bad("rotate", "table", torch.empty(9, 2 * D, device="meta"), ValueError, "device cpu", "meta"),
    *(
        bad("gather_add_norm", "eps", value, ValueError, "> 0", f"{value:.0g}")
        for value in (0.0, -1e-6, float("nan"), float("inf"))
    ),
]


@pytest.mark.parametrize(("op", "argument", "value", "error", "named", "words"), CASES)
def test_message(
    op: str, argument: str, value: Any, error: type[Exception], named: str, words: tuple[str, ...]
) -> None:
    """ "op: argument: expected X, got Y. Cure"."""
    arguments = GOOD[op]() | {argument: value}
    with pytest.raises(error) as caught:
        getattr(sk, op)(**arguments)
    assert type(caught.value) is error
    message = str(caught.value)
    assert re.match(rf"{op}: {re.escape(named)}[\w.]*: expected .+, got .+\. \S", message, re.DOTALL), message
    for word in words:
        assert word in message


@pytest.mark.parametrize("op", GOOD)
def test_a_stranger_in_place_of_a_tensor(op: str) -> None:
    for name, value in GOOD[op]().items():
        if not isinstance(value, Tensor):
            continue
        for stranger in (None, 3, "x", [1.0], object()):
            if stranger is None and name in ("base", "gamma", "key_bias"):
                continue
            found = type(stranger).__name__
            with pytest.raises(TypeError, match=rf"^{op}: {name}: expected a Tensor, got {found}\. \S"):
                getattr(sk, op)(**GOOD[op]() | {name: stranger})


@pytest.mark.parametrize("op", SELECTED)
def test_a_stranger_in_a_selection(op: str) -> None:
    for stranger in (None, 3, [0, 2]):
        broken = selection()._replace(indices=stranger)
        with pytest.raises(TypeError, match=rf"^{op}: selection.indices: expected a Tensor, got .*\. \S"):
            getattr(sk, op)(**GOOD[op]() | {"selection": broken})


@pytest.mark.parametrize("op", [*PACKED, "merge_tokens"])
def test_a_stranger_in_place_of_a_number(op: str) -> None:
    numbers = {"compact_attention": ("max_seqlen",), "merge_tokens": ("max_seqlen_out", "total")}
    for name in numbers.get(op, ("max_seqlen", "num_prefix")):
        for stranger in ("6", 6.5, [6], *([None] if name != "total" else [])):
            with pytest.raises((TypeError, RuntimeError)) as caught:
                getattr(sk, op)(**GOOD[op]() | {name: stranger})
            assert op in str(caught.value)
            assert name in str(caught.value)


@pytest.mark.parametrize("op", GOOD)
def test_device_without_a_kernel(op: str) -> None:
    arguments = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in GOOD[op]().items()}
    with pytest.raises(RuntimeError, match=rf"^{op}: .*'meta'.*backend\(\"reference\"\)"):
        getattr(sk, op)(**arguments)


def test_exactly_one_of_keep_and_mass() -> None:
    message = r"^prune_attention: keep: expected exactly one of keep and mass, got .*\. \S"
    for given in ({"keep": None}, {"mass": 0.5}):
        with pytest.raises(ValueError, match=message):
            sk.prune_attention(**GOOD["prune_attention"]() | given)


@pytest.mark.parametrize("value", [0.0, 1.1, float("nan")])
def test_mass_of_prune_attention(value: float) -> None:
    with pytest.raises(ValueError, match=r"^prune_attention: mass: expected .* got .*\. \S"):
        sk.prune_attention(**GOOD["prune_attention"]() | {"keep": None, "mass": value})


@pytest.mark.parametrize("limits", [{"min_keep": 0}, {"min_keep": 3, "max_keep": 2}, {"max_keep": 1.5}], ids=str)
def test_limits_of_prune_attention(limits: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError), match=r"^prune_attention: m.._keep: expected .* got .*\. \S"):
        sk.prune_attention(**GOOD["prune_attention"]() | {"keep": None, "mass": 0.5} | limits)


def test_same_messages_from_the_registered_ops() -> None:
    """torch.ops.sait.* check for themselves."""
    q, x, weight = heads(), randn(S, C), randn(C)
    with pytest.raises(ValueError, match="compact_attention: max_seqlen: expected at least 6"):
        torch.ops.sait.compact_attention(q, q, q, cu_of(LENGTHS), 5, None, None, None)
    with pytest.raises(ValueError, match="compact_attention: selection: expected indices and cu_seqlens together"):
        torch.ops.sait.compact_attention(q, q, q, cu_of(LENGTHS), 6, selection().indices, None, None)
    with pytest.raises(ValueError, match="compact_attention_backward: grad: expected shape"):
        torch.ops.sait.compact_attention_backward(randn(T, 3), q, q, q, cu_of(LENGTHS), 6, None, None, None)
    with pytest.raises(ValueError, match="compact_attention_backward: key_bias: expected shape"):
        torch.ops.sait.compact_attention_backward(q.flatten(1), q, q, q, cu_of(LENGTHS), 6, None, None, None, randn(3))
    with pytest.raises(ValueError, match="score_tokens_backward: grad: expected shape"):
        torch.ops.sait.score_tokens_backward(randn(3), q, q, None, cu_of(LENGTHS), 6, "cls", 1, None)
    with pytest.raises(ValueError, match="gather_add_norm_backward: grad_normed: expected shape"):
        torch.ops.sait.gather_add_norm_backward(x, x[:2], x, x, weight, None, 1e-6)
    target, ones, cu = positions(), torch.ones(T), cu_of(LENGTHS)
    for grad, rows, to, message in (
        (randn(T - 1, C), None, target, "cu_seqlens_out: expected a last value of at most 9"),
        (randn(T, C), randn(T, C - 1), target, "x: expected shape .10, 32."),
        (randn(T, C), randn(T, C).half(), target, "x: expected dtype Float as grad"),
        (randn(T, C), None, target + 2, "target: expected rows of the images in .0, 10., or -1 for none, got 10"),
        (randn(T, C), None, target[None], "target: expected a 1-D tensor"),
    ):
        with pytest.raises((ValueError, TypeError), match=f"merge_tokens_backward: {message}"):
            torch.ops.sait.merge_tokens_backward(grad, rows, to, ones, cu)
    with pytest.raises(ValueError, match="rotate_backward: grad_k: expected shape"):
        torch.ops.sait.rotate_backward(q, q[1:], positions(), randn(9, 2 * D), False)
    with pytest.raises(ValueError, match="prune_attention: mass: expected a mass, with min_keep, max_keep or static"):
        torch.ops.sait.prune_attention(q, q, q, cu_of(LENGTHS), 6, 0.5, None, None, "cls", 1, None, 1, None, True)
    with pytest.raises(ValueError, match="select_topk: keep: expected exactly one"):
        torch.ops.sait.select_topk(randn(T), cu_of(LENGTHS), 6, None, None, 1)


def test_bad_arguments_leave_nothing_behind() -> None:
    """A refused call does not disturb the next one."""
    want = sk.prune_attention(**GOOD["prune_attention"]())[0]
    with pytest.raises(ValueError, match="max_seqlen"):
        sk.prune_attention(**GOOD["prune_attention"]() | {"max_seqlen": 1})
    assert torch.equal(sk.prune_attention(**GOOD["prune_attention"]())[0], want)


@full_only(lambda seed: seed > 0)
@pytest.mark.parametrize("seed", [0, 1])
def test_fuzz(seed: int) -> None:
    """Thousands of calls with random changes, in a process of its own, so that a crash is a failure and not the end."""
    done = run_python("-X", "faulthandler", str(Path(__file__).with_name("fuzz.py")), str(seed), "2000")
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert "2000 calls" in done.stdout
