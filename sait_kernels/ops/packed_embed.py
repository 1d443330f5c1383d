"""packed_embed: images -> the rows that a transformer's first block takes. For inference on a CPU only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sait_kernels.backend import choose, kernels, register
from sait_kernels.ops.packed_linear import _refuse_gradients, packed_linear_reference
from sait_kernels.registration import register_op


def packed_embed(
    images: Tensor,
    packed: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    *,
    patch: tuple[int, int],
    prefix: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Patch embedding: each image's prefix rows, then positions + patches weight^T + bias, packed.

    The bits of packed_linear on the patches laid out as rows, with the positions as its residual: they are gathered in
    a thread's cache, and neither they nor anything between them and the result is written to memory. A thread that is
    held up takes fewer images.

    Args:
        images: (B, channels, height, width) float32, bfloat16 or float16, the pixels of a row contiguous; height and
            width of whole patches.
        packed: pack_linear(weight.flatten(1)) of a convolution's weight (O, channels, *patch), of images' dtype.
        out_features: O.
        bias: (O,) or None.
        patch: height and width of a patch.
        prefix: (P, O) of images' dtype, contiguous, or None: rows that stand before the patches of each image.
        positions: (N, O) of images' dtype, contiguous, one for each patch in raster order, or None.

    Returns:
        (B * (P + N), O) of images' dtype.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device.
        RuntimeError: tensors that are not on a CPU, or that need a gradient.
    """
    op = "packed_embed"
    optional = {"bias": bias, "prefix": prefix, "positions": positions}
    served = choose(op, {"images": images, "packed": packed}, optional)
    _refuse_gradients(op, images, packed, bias, prefix, positions)
    if served == "reference":
        return packed_embed_reference(
            images, packed, out_features, bias, patch=patch, prefix=prefix, positions=positions
        )
    return kernels(served).packed_embed(images, packed, out_features, bias, *patch, prefix, positions)


def packed_embed_reference(
    images: Tensor,
    packed: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    *,
    patch: tuple[int, int],
    prefix: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    rows = F.unfold(images, patch, stride=patch).transpose(1, 2)  # (B, N, channels * height * width)
    B, N, _ = rows.shape
    residual = None if positions is None else positions.repeat(B, 1)
    out = packed_linear_reference(rows.flatten(0, 1), packed, out_features, bias, residual=residual)
    if prefix is not None:
        out = torch.cat([prefix.expand(B, -1, -1), out.view(B, N, out_features)], 1).flatten(0, 1)
    return out


def _fake(
    images: Tensor,
    packed: Tensor,
    out_features: int,
    bias: Tensor | None,
    patch_height: int,
    patch_width: int,
    prefix: Tensor | None,
    positions: Tensor | None,
) -> Tensor:
    patches = (images.shape[2] // patch_height) * (images.shape[3] // patch_width)
    rows = patches + (0 if prefix is None else prefix.shape[0])
    return images.new_empty(images.shape[0] * rows, out_features)


register_op("packed_embed", _fake, __name__)
register("packed_embed")
