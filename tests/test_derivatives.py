"""Derivatives of other kinds than loss.backward(): right, or an error that names the op and the cure; never zero."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import sait
import timm
import torch
from helpers import BACKENDS, KERNEL_BACKENDS, flat, randn
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import sait_kernels as sk
from sait_kernels.backend import KERNELS

LENGTHS, H, D = (9, 4), 2, 8
T, LONGEST, C = sum(LENGTHS), max(LENGTHS), H * D
CU = torch.tensor([0, 9, 13], dtype=torch.int32)
KEPT = sk.reference.select_topk(randn(T, seed=9), CU, LONGEST, keep=0.5)
SECOND = 'second derivative. Use `with sait_kernels.backend\\("reference"\\)`'
CURE = 'sait_kernels.backend\\("reference"\\)'

Op = Callable[..., Any]


def inputs(op: str) -> tuple[Tensor, ...]:
    """Those with gradients, float64."""
    rows, vector = functools.partial(randn, dtype=torch.float64), functools.partial(randn, C, dtype=torch.float64)
    q, k, v = (rows(T, H, D, seed=seed) for seed in range(3))
    x, y = rows(T, C, seed=3), rows(len(KEPT.indices), C, seed=4)
    weight, vectors = rows(C, C, seed=5), [vector(seed=seed) for seed in (6, 7, 8)]
    return {
        "compact_attention": (q, k, v),
        "prune_attention": (q, k, v),
        "score_tokens": (q, k, v),
        "gather_tokens": (x,),
        "scatter_tokens": (y, x),
        "gather_add_norm": (x, y, *vectors),
        "norm_linear": (x, vectors[0], vectors[1], weight, vectors[2]),
        "linear_residual": (y, weight, vectors[0], x, vectors[1]),
        "merge_tokens": (x, rows(T, seed=12)),
        "rotate": (q, k),
    }[op]


TABLE = randn(LONGEST, 2 * D, seed=11)
POSITIONS = torch.tensor([-1, 0, 1, 2, 3, 4, 5, 6, 7, -1, 2, 5, 7], dtype=torch.int32)
CALLS: dict[str, Op] = {
    "compact_attention": lambda q, k, v: sk.compact_attention(q, k, v, CU, LONGEST, selection=KEPT),
    "prune_attention": lambda q, k, v: sk.prune_attention(q, k, v, CU, LONGEST, keep=0.5)[0],
    "score_tokens": lambda q, k, v: sk.score_tokens(q, k, CU, LONGEST, kind="cls_value", v=v),
    "gather_tokens": lambda x: sk.gather_tokens(x, KEPT),
    "scatter_tokens": lambda y, x: sk.scatter_tokens(y, KEPT, T, base=x),
    "gather_add_norm": lambda x, y, weight, bias, gamma: torch.cat(
        sk.gather_add_norm(x, y, KEPT, weight, bias, 1e-6, gamma=gamma)
    ),
    "norm_linear": lambda x, scale, shift, weight, bias: sk.norm_linear(x, scale, shift, 1e-6, weight, bias, gelu=True),
    "linear_residual": lambda y, weight, bias, x, gamma: sk.linear_residual(
        y, weight, bias, x, selection=KEPT, gamma=gamma
    ),
    "merge_tokens": lambda x, weight: sk.merge_tokens(x, POSITIONS, weight, CU, LONGEST),
    "rotate": lambda q, k: torch.cat(sk.rotate(q, k, POSITIONS, TABLE.to(q.dtype))),
}
HAVE_BACKWARD_KERNELS = ("compact_attention", "prune_attention", "score_tokens", "gather_add_norm")
WITH_KERNELS = [(op, backend) for op in CALLS for backend in KERNEL_BACKENDS if backend in KERNELS.get(op, ())]


def single(op: str) -> tuple[Tensor, ...]:
    return tuple(t.float().requires_grad_() for t in inputs(op))


def test_every_differentiable_op_is_here() -> None:
    differentiable = {
        op for op in KERNELS if torch._C._dispatch_has_kernel_for_dispatch_key(f"sait::{op}", "AutogradCPU")
    }
    assert {op for op in differentiable if not op.endswith("_backward")} <= set(CALLS)


@pytest.mark.parametrize("op", CALLS)
def test_the_reference_has_derivatives_of_any_kind(op: str) -> None:
    variables = tuple(t.requires_grad_() for t in inputs(op))
    with sk.backend("reference"):
        assert gradcheck(CALLS[op], variables, check_forward_ad=True, fast_mode=True)
        assert gradgradcheck(CALLS[op], variables, fast_mode=True)
        tangents = torch.func.jvp(CALLS[op], inputs(op), inputs(op))[1]
        assert tangents.abs().max() > 0


@pytest.mark.parametrize(("op", "backend"), WITH_KERNELS)
def test_second_derivatives(op: str, backend: str) -> None:
    """Right where they are made of other ops; else refused when they are asked for, not before."""

    def second(variables: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        firsts = torch.autograd.grad(CALLS[op](*variables).square().sum(), variables, create_graph=True)
        return torch.autograd.grad(sum(first.square().sum() for first in firsts), variables)

    with sk.backend("reference"):
        exact = second(tuple(t.requires_grad_() for t in inputs(op)))
    with sk.backend(backend):
        firsts = torch.autograd.grad(CALLS[op](*single(op)).square().sum(), single(op), allow_unused=True)
        assert len(firsts) == len(exact)
        if op in HAVE_BACKWARD_KERNELS:
            named = "compact_attention" if op == "prune_attention" else op  # whose gradient it is
            with pytest.raises(RuntimeError, match=f"{named}: .*{SECOND}"):
                second(single(op))
            return
        got = second(single(op))
    for mine, right in zip(got, exact, strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=1e-3, atol=1e-3 * float(right.abs().max()))


@pytest.mark.parametrize(("op", "backend"), WITH_KERNELS)
def test_forward_mode_and_function_transforms_are_refused(op: str, backend: str) -> None:
    primals = tuple(t.detach() for t in single(op))
    with sk.backend(backend):
        with pytest.raises(RuntimeError, match=f"{op}: .*forward mode.*{CURE}"):
            torch.func.jvp(CALLS[op], primals, primals)
        with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match=f"{op}: .*forward mode.*{CURE}"):
            CALLS[op](torch.autograd.forward_ad.make_dual(primals[0], primals[0]), *primals[1:])
        with pytest.raises(RuntimeError, match=f"{op}: .*torch.func.grad.*{CURE}"):
            torch.func.grad(lambda *t: CALLS[op](*t).sum())(*primals)
        CALLS[op](*primals)  # nothing of it stays


@pytest.mark.parametrize(("op", "backend"), WITH_KERNELS)
@pytest.mark.filterwarnings("ignore:.*performance drop.*")
def test_vmap_is_a_loop(op: str, backend: str) -> None:
    primals = tuple(t.detach() for t in single(op))
    several = torch.stack([primals[0], primals[0] * 0.5])
    with sk.backend(backend):
        want = [CALLS[op](one, *primals[1:]) for one in several]
        got = torch.func.vmap(lambda one: CALLS[op](one, *primals[1:]))(several)
    for mine, right in zip(flat(got), flat(torch.stack(want)), strict=True):
        torch.testing.assert_close(mine, right, rtol=0, atol=0)


@pytest.mark.parametrize("optimized", [False, True])
def test_models_in_forward_mode(optimized: bool) -> None:
    """The GEMMs of a block are fused where no derivative is wanted, and a tangent is one."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, embed_dim=64, num_heads=2, depth=3).eval()
    sait.sparsify(model, block=1, keep=1.0)
    if optimized:
        sait.optimize(model)
    x, t = randn(1, 3, 64, 64), randn(1, 3, 64, 64, seed=1)
    with torch.no_grad():
        model(x)
        with pytest.raises(RuntimeError, match=f"attention: .*forward mode.*{CURE}"):
            torch.func.jvp(model, (x,), (t,))
        with sk.backend("reference"):
            tangent = torch.func.jvp(model, (x,), (t,))[1]
            model, x, t = sait.deoptimize(model).double(), x.double(), t.double()
            finite = (model(x + 1e-5 * t) - model(x - 1e-5 * t)) / 2e-5
    torch.testing.assert_close(tangent.double(), finite, rtol=0, atol=1e-4 * float(finite.abs().max()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_still_flow(backend: str) -> None:
    """Beside the refusals: with a graph of the gradients that nobody differentiates."""
    if not sk.can_run("compact_attention", backend, randn(1))[0]:
        pytest.skip(f"no {backend} here")
    variables = single("compact_attention")
    with sk.backend(backend):
        firsts = torch.autograd.grad(CALLS["compact_attention"](*variables).sum(), variables, create_graph=True)
    assert all(first.abs().max() > 0 for first in firsts)
