"""Pre-training without labels and without a MASK token (arXiv 2104.09694): which patches were replaced?

Some patches of each image are replaced by patches of others, and each token that is left says whether it was one of
them. Dropping tokens at random makes that fast, for there is no token whose only use is to stand for what is missing:

>>> import sait, timm, torch
>>> model = timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=16, num_classes=10)
>>> model = sait.sparsify(model, sait.methods.random(keep=0.5))
>>> head = torch.nn.Linear(model.embed_dim, 1)
>>> images, replaced = replace_patches(torch.randn(4, 3, 64, 64), 16)
>>> logits = head(model.forward_features(images))
>>> loss = replaced_loss(logits, replaced, sait.selections(model)[-1], num_prefix=model.num_prefix_tokens)
>>> loss.backward()
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sait_kernels import Selection

SHARE = 0.15  # of the paper


class Replaced(NamedTuple):
    """What replace_patches gives.

    Attributes:
        images: as they came, with some patches of others.
        replaced: (B, patches) bool, in raster order, which patches these are.
    """

    images: Tensor
    replaced: Tensor


def replace_patches(
    images: Tensor,
    patch_size: int | tuple[int, int],
    share: float = SHARE,
    *,
    generator: torch.Generator | None = None,
) -> Replaced:
    """Replaces some patches of each image, each by the patch of another image of the batch; chance draws both.

    The new patch comes from the same place of the other image. That is our choice: where it was cannot give it away.

    Args:
        images: (B, C, height, width), any dtype, of 2 images or more. They are not changed.
        patch_size: side of a patch in pixels, or (height, width); it divides the image.
        share: in (0, 1): round(share * patches) are replaced in each image, and at least one.
        generator: of the random numbers, on the images' device; None: torch's own.

    Raises:
        ValueError: one image alone, a patch size that does not divide the image, or a share outside its range.
    """
    if images.dim() != 4 or len(images) < 2:
        raise ValueError(
            f"replace_patches: images: expected (B, C, height, width) of 2 images or more, got {tuple(images.shape)}. "
            "New patches come from the other images of the batch."
        )
    if not 0 < share < 1:
        raise ValueError(f"replace_patches: share: expected a number between 0 and 1, got {share}.")
    height, width = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    if height < 1 or width < 1 or images.shape[2] % height or images.shape[3] % width:
        raise ValueError(
            f"replace_patches: patch_size: expected one that divides {images.shape[2]} x {images.shape[3]} pixels, got "
            f"{height} x {width}."
        )
    B, rows, columns = len(images), images.shape[2] // height, images.shape[3] // width
    patches = rows * columns
    random: dict[str, Any] = {"generator": generator, "device": images.device}
    chosen = torch.rand(B, patches, **random).topk(max(1, round(share * patches)), dim=1).indices
    replaced = torch.zeros(B, patches, dtype=torch.bool, device=images.device).scatter_(1, chosen, True)
    # By 1 to B - 1 images further on: never the image itself.
    further = torch.randint(1, B, (B, patches), **random)
    source = (torch.arange(B, device=images.device)[:, None] + further.where(replaced, 0)) % B
    tiles = images.unflatten(3, (columns, width)).unflatten(2, (rows, height)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    mixed = tiles[source, torch.arange(patches, device=images.device)]  # (B, patches, C, height, width)
    mixed = mixed.unflatten(1, (rows, columns)).permute(0, 3, 1, 4, 2, 5)
    return Replaced(mixed.flatten(4, 5).flatten(2, 3), replaced)


def replaced_loss(logits: Tensor, replaced: Tensor, selection: Selection | None = None, *, num_prefix: int) -> Tensor:
    """Binary cross-entropy of "this patch was replaced", the mean over all patches that are left, replaced or not.

    Args:
        logits: one for each row that is left, images in order, each with its ``num_prefix`` prefix rows first, which do
            not count: (B, n), (B, n, 1) or packed (S,).
        replaced: (B, patches) bool, of replace_patches.
        selection: who is left, sait.selections(model)[-1]; None: all.
        num_prefix: class, distillation and register tokens of an image.

    Returns:
        A float32 scalar, differentiable in the logits; 0 where no patch is left.

    Raises:
        ValueError: not as many logits as rows are left.
    """
    images, tokens = replaced.shape[0], replaced.shape[1] + num_prefix
    targets = F.pad(replaced.to(logits.device), (num_prefix, 0)).flatten()  # (B * N,)
    counts = F.pad(replaced.new_ones(replaced.shape), (num_prefix, 0)).flatten().to(logits.device)
    rows = images * tokens if selection is None else selection.indices.numel()
    if logits.numel() != rows:
        raise ValueError(
            f"replaced_loss: logits: expected {rows}, one for each row that is left of {images} images of {tokens} "
            f"tokens, got {tuple(logits.shape)}. Padded rows do not belong here: pass packed ones."
        )
    if selection is not None:
        places = selection.indices.long().clamp_max(images * tokens)  # one more stands for no row
        targets, counts = (F.pad(values, (0, 1))[places] for values in (targets, counts))
    losses = F.binary_cross_entropy_with_logits(logits.float().flatten(), targets.float(), reduction="none")
    return losses.where(counts, 0).sum() / counts.sum().clamp_min(1)
