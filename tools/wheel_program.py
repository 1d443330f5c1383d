"""What `make wheel-test` runs in an environment that has the wheel and nothing of the source tree."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import sait_kernels as sk
from sait_kernels import library
from sait_kernels.backend import KERNELS

B, N, H, D = 3, 50, 3, 64
C, T = H * D, B * N


def arguments() -> dict[str, Callable[[], Any]]:
    """op -> a call of it."""
    g = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    q, k, v = (randn(T, 3 * C).chunk(3, 1)[i].unflatten(1, (H, D)) for i in range(3))
    cu = sk.uniform_cu_seqlens(B, N)
    scores, x = torch.rand(T, generator=g), randn(T, C)
    selection = sk.select_topk(scores, cu, N, keep=0.45)
    y, weight, bias, gamma = randn(len(selection.indices), C), randn(C), randn(C), randn(C)
    wide, narrow, square = randn(4 * C, C) / 14, randn(C, 4 * C) / 28, randn(C, C) / 14
    positions = torch.randint(-1, 7, (T,), generator=g, dtype=torch.int32)
    table = randn(7, 2 * D)
    fused = torch.arange(T, dtype=torch.int32) // 2  # each two neighbours of an image
    proj, fc1, fc2 = (sk.pack_linear(w) for w in (square, wide, narrow))
    layers = [sk.PackedLayer(packed) for packed in (proj, fc1, fc2)]
    images, patches = randn(2, 3, 8, 12), sk.pack_linear(randn(C, 48) / 7)
    norm, qkv = (weight, bias, 1e-6), sk.PackedLayer(sk.pack_linear(randn(3 * C, C) / 14))
    block = sk.EncoderBlock(norm, qkv, layers[0], norm, *layers[1:])
    encoder = sk.PackedEncoder([block] * 2, heads=H, head_dim=D, hidden_features=4 * C)
    return {
        "score_tokens": lambda: sk.score_tokens(q, k, cu, N),
        "select_topk": lambda: sk.select_topk(scores, cu, N, keep=0.45),
        "select_mass": lambda: sk.select_mass(scores, cu, N, mass=0.6),
        "compact_attention": lambda: sk.compact_attention(q, k, v, cu, N, selection=selection),
        "prune_attention": lambda: sk.prune_attention(q, k, v, cu, N, keep=0.45),
        "gather_tokens": lambda: sk.gather_tokens(x, selection),
        "scatter_tokens": lambda: sk.scatter_tokens(y, selection, T),
        "gather_add_norm": lambda: sk.gather_add_norm(x, y, selection, weight, bias, 1e-6, gamma=gamma),
        "merge_tokens": lambda: sk.merge_tokens(x, fused, scores, sk.uniform_cu_seqlens(B, N // 2), N // 2),
        "rotate": lambda: sk.rotate(q, k, positions, table),
        "norm_linear": lambda: sk.norm_linear(x, weight, bias, 1e-6, wide, None, activation="gelu"),
        "linear_residual": lambda: sk.linear_residual(y, square, bias, x, selection=selection),
        "pack_linear": lambda: sk.pack_linear(square),
        "packed_linear": lambda: sk.packed_linear(x, fc1, 4 * C, activation="gelu"),
        "packed_block": lambda: sk.packed_block(
            y, x, layers[0], norm, *layers[1:], hidden_features=4 * C, selection=selection
        ),
        "norm_heads": lambda: sk.norm_heads(q, weight[:D], bias[:D], 1e-6),
        "packed_embed": lambda: sk.packed_embed(images, patches, C, bias, patch=(4, 4), prefix=x[:1], positions=x[1:7]),
        "packed_encoder": lambda: sk.packed_encoder(x, cu, N, encoder, stages=[sk.EncoderStage(0, keep=0.45)]),
    }


def tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, sk.Selection):
        return [result.indices, result.cu_seqlens]
    return [t for part in result for t in tensors(part)] if isinstance(result, tuple) else []


def compare(name: str, got: Any, wanted: Any) -> None:
    got, wanted = tensors(got), tensors(wanted)
    assert len(got) == len(wanted), name
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4, msg=lambda text: f"{name}: {text}")


def pruned_transformer() -> None:
    """Two blocks of a Vision Transformer, made of the ops, against plain torch with the same choice."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(T, C, generator=g)
    qkv, proj = (torch.randn(n, C, generator=g) / C**0.5 for n in (3 * C, C))
    weight, bias = torch.ones(C), torch.zeros(C)
    cu = sk.uniform_cu_seqlens(B, N)

    def forward() -> Tensor:
        rows, offsets, longest = x, cu, N
        for keep in (0.5, None):
            normed = torch.nn.functional.layer_norm(rows, (C,), weight, bias, 1e-6)
            q, k, v = torch.nn.functional.linear(normed, qkv).unflatten(1, (3, H, D)).unbind(1)
            if keep is None:
                rows = rows + sk.compact_attention(q, k, v, offsets, longest) @ proj.T
                continue
            out, selection = sk.prune_attention(q, k, v, offsets, longest, keep=keep)
            rows, _ = sk.gather_add_norm(rows, out @ proj.T, selection, weight, bias, 1e-6)
            offsets, longest = selection.cu_seqlens, selection.max_seqlen
        return rows

    got = forward()
    with sk.backend("reference"):
        compare("a pruned transformer", got, forward())
    assert len(got) < T


def pruned_timm() -> None:
    import sait
    import timm

    torch.manual_seed(0)
    images = torch.randn(2, 3, 224, 224)
    vit = timm.create_model("deit_tiny_patch16_224", num_classes=10).eval()
    with torch.no_grad():
        dense = vit(images)
        sparse = sait.sparsify(vit, block=3, keep=1.0)
        compare("all patches kept", sparse(images), dense)
        sait.set_density(sparse, keep=0.45)
        got = sparse(images)
        with sk.backend("reference"):
            compare("DeiT-T at 0.45", got, sparse(images))


def main() -> None:
    assert library.module is not None, library.problem
    for compiler in ("gcc", "g++", "cc", "nvcc"):
        assert shutil.which(compiler) is None, f"{compiler} is on the path"
    calls = arguments()
    assert sorted(calls) == sorted(KERNELS), set(KERNELS) ^ set(calls)
    for op, call in calls.items():
        got = call()
        with sk.backend("reference"):
            compare(op, got, call())
    pruned_transformer()
    parts = ["a pruned transformer"]
    if importlib.util.find_spec("timm") is not None:
        pruned_timm()
        parts.append("timm's DeiT-T pruned")
    print(f"torch {torch.__version__}: {len(calls)} ops and {', '.join(parts)}: as plain torch computes them")


if __name__ == "__main__":
    main()
