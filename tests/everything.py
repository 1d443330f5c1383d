"""Every op, forward and backward, on one batch: for tests of what must hold for all of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from helpers import Case, bounds_of, cu_of, leaves, make_qkv, randn
from torch import Tensor

import sait_kernels as sk
from sait_kernels.backend import KERNELS, forced_backend

POSITIONS = 2048  # of the rotary table: more than any image has rows


@dataclass
class Batch:
    """Inputs of all ops."""

    lengths: tuple[int, ...]
    qkv: tuple[Tensor, Tensor, Tensor]  # (T, H, D) each
    x: Tensor  # (T, C)
    scores: Tensor  # (T,)

    @classmethod
    def random(cls, lengths: tuple[int, ...], dtype: torch.dtype, H: int = 2, D: int = 32, seed: int = 0) -> Batch:
        T = sum(lengths)
        qkv, x = make_qkv(Case(lengths, H, D), dtype, seed), randn(T, H * D, dtype=dtype, seed=seed + 1)
        return cls(lengths, qkv, x, randn(T, seed=seed + 2).exp())

    def image(self, b: int) -> Batch:
        """Image b as a batch of its own, of the same memory."""
        begin, end = bounds_of(cu_of(self.lengths))[b]
        return Batch(
            (self.lengths[b],), tuple(t[begin:end] for t in self.qkv), self.x[begin:end], self.scores[begin:end]
        )


@dataclass
class TokenRows:
    """A result with a row (or several values a row) for each token of an image; ``cu`` says where images start."""

    values: Tensor
    cu: Tensor | None  # None: one result for the whole batch

    def image(self, b: int) -> Tensor:
        assert self.cu is not None
        begin, end = bounds_of(self.cu)[b]
        return self.values[begin:end]


def run_everything(batch: Batch, keep: float = 0.45, mass: float = 0.8) -> dict[str, TokenRows]:
    """name -> result. Gradients are those of the sum of squares, which is a sum over rows."""
    results: dict[str, TokenRows] = {}
    cu, longest = cu_of(batch.lengths), max(batch.lengths, default=0)
    starts = cu[:-1].repeat_interleave(cu.diff().long())  # first row of each row's image

    def note(name: str, cu: Tensor | None, out: Tensor, **inputs: tuple[Tensor, Tensor | None]) -> None:
        results[name] = TokenRows(out.detach(), cu)
        grads = torch.autograd.grad(
            out.float().square().sum(), [t for t, _ in inputs.values()], materialize_grads=True, retain_graph=True
        )
        for (argument, (_, rows)), grad in zip(inputs.items(), grads, strict=True):
            results[f"{name}: d{argument}"] = TokenRows(grad, rows)

    def note_selection(name: str, selection: sk.Selection) -> None:
        first = starts[selection.indices.long()]
        results[f"{name}: indices"] = TokenRows(selection.indices - first, selection.cu_seqlens)
        results[f"{name}: lengths"] = TokenRows(selection.cu_seqlens.diff(), torch.arange(len(cu)))

    selections = {
        "select_topk": sk.select_topk(batch.scores, cu, longest, keep=keep),
        "select_mass": sk.select_mass(batch.scores, cu, longest, mass=mass),
    }
    for name, selection in selections.items():
        note_selection(name, selection)
    selection = selections["select_topk"]
    kept = selection.cu_seqlens

    q, k, v = leaves(*batch.qkv)
    qkv = {"q": (q, cu), "k": (k, cu), "v": (v, cu)}
    for kind in ("cls", "column", "cls_value"):
        note(f"score_tokens {kind}", cu, sk.score_tokens(q, k, cu, longest, kind=kind, v=v), **qkv)
    note("compact_attention", cu, sk.compact_attention(q, k, v, cu, longest), **qkv)
    note("compact_attention kept", kept, sk.compact_attention(q, k, v, cu, longest, selection=selection), **qkv)
    (key_bias,) = leaves(batch.scores.log())
    if sk.can_run("compact_attention", forced_backend() or "reference", q, key_bias=key_bias)[0]:
        out = sk.compact_attention(q, k, v, cu, longest, selection=selection, key_bias=key_bias)
        note("compact_attention biased", kept, out, **qkv, key_bias=(key_bias, cu))
    for rule in ({"keep": keep}, {"mass": mass}):
        name = f"prune_attention {next(iter(rule))}"
        out, chosen = sk.prune_attention(q, k, v, cu, longest, **rule)
        note(name, chosen.cu_seqlens, out, **qkv)
        note_selection(name, chosen)

    positions = torch.arange(batch.qkv[0].shape[0], dtype=torch.int32) - starts - 1  # an image's first row has none
    (table,) = leaves(randn(POSITIONS, 2 * q.shape[2], seed=6))
    for pairs in (False, True):
        rotated = torch.cat(sk.rotate(q, k, positions, table, pairs=pairs), 1)
        note(f"rotate {'pairs' if pairs else 'halves'}", cu, rotated, q=(q, cu), k=(k, cu), table=(table, None))

    x, y = leaves(batch.x, batch.x[selection.indices.long()].sin())
    C = x.shape[1]
    weight, bias, gamma = leaves(*(randn(C, dtype=x.dtype, seed=s) for s in (7, 8, 9)))
    note("gather_tokens", kept, sk.gather_tokens(x, selection), x=(x, cu))
    scattered = sk.scatter_tokens(y, selection, len(x), base=x)
    note("scatter_tokens", cu, scattered, y=(y, kept), base=(x, cu))
    if forced_backend() in (None, "reference", *KERNELS["merge_tokens"]):
        place = torch.arange(len(x), dtype=torch.int32) - starts  # an image's first row goes nowhere
        target = torch.where(place > 0, starts + (place - 1) // 2, -1)
        (shares,) = leaves(batch.scores.cos())
        merged = sk.merge_tokens(x, target, shares, cu, longest)
        note("merge_tokens", cu, merged, x=(x, cu), weight=(shares, cu))
    vectors = {"weight": (weight, None), "bias": (bias, None), "gamma": (gamma, None)}
    residual, normed = sk.gather_add_norm(x, y, selection, weight, bias, 1e-6, gamma=gamma)
    note("gather_add_norm", kept, torch.cat([residual, normed], 1), x=(x, cu), y=(y, kept), **vectors)
    return results
