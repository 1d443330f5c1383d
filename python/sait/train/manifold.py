"""Manifold distillation (Jia et al., arXiv 2107.01378): features lie to each other as the teacher's do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sait_kernels as sk
from sait_kernels import Selection

WITHIN_IMAGE, ACROSS_IMAGES, RANDOM = 4.0, 0.1, 0.2  # weights of the paper's three parts
SAMPLED = 192  # rows of the random part


def manifold_loss(teacher: Tensor, student: Tensor) -> Tensor:
    """4 L_within + 0.1 L_across + 0.2 L_random, each the mean squared difference of Gram matrices.

    Rows are L2-normalised. Within an image: n x n matrices of its tokens; across images: B x B matrices of the tokens
    in one place; random: one matrix of SAMPLED tokens of the batch. That the squares are averaged, not summed, is our
    choice: it leaves the parts alike for any number of images and tokens.

    Args:
        teacher: (B, n, C), student: (B, n, D); the same n tokens of each image.
    """
    teacher, student = (F.normalize(features.float(), dim=-1) for features in (teacher, student))
    rows = torch.randperm(teacher.shape[0] * teacher.shape[1], device=teacher.device)[:SAMPLED]

    def difference(t: Tensor, s: Tensor) -> Tensor:
        return F.mse_loss(s @ s.mT, t @ t.mT)

    return (
        WITHIN_IMAGE * difference(teacher, student)
        + ACROSS_IMAGES * difference(teacher.transpose(0, 1), student.transpose(0, 1))
        + RANDOM * difference(teacher.flatten(0, 1)[rows], student.flatten(0, 1)[rows])
    )


def same_tokens(features: Tensor, num_prefix: int, selection: Selection, student_prefix: int) -> Tensor:
    """The teacher's features (B, N, C) of the patches that the student kept, (B, n, C); n is equal for all images."""
    images, patches = features.shape[0], features[:, num_prefix:]
    tokens = student_prefix + patches.shape[1]
    # Rows of the student's batch, prefix rows of every image first; the teacher may have another number of those.
    rows = selection.indices.view(images, -1)[:, student_prefix:]
    image = torch.arange(images, dtype=rows.dtype, device=rows.device)[:, None]
    rows = rows - image * tokens - student_prefix + image * patches.shape[1]
    kept = sk.uniform_cu_seqlens(images, rows.shape[1], rows.device)
    chosen = Selection(rows.flatten().contiguous(), kept, rows.shape[1])
    return sk.gather_tokens(patches.flatten(0, 1), chosen).view(images, rows.shape[1], -1)


@contextlib.contextmanager
def last_features(model: Any) -> Iterator[list[Tensor]]:
    """Collects what the final norm of a Vision Transformer gives: (B, n, C) of every forward."""
    seen: list[Tensor] = []
    hook = model.norm.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        yield seen
    finally:
        hook.remove()
