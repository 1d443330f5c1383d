"""What a student learns from a teacher: where its class token looks, and its logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sait import checkpoint
from sait.methods.plan import Plan, Stage
from sait.sparsify import sparsify
from sait.state import record_scores, set_density
from sait.train.config import Config, TrainingError
from sait.train.manifold import last_features


def patch_shares(scores: Tensor, images: int, num_prefix: int) -> Tensor:
    """Scores (B * N,) of a dense batch as shares of each image's patches, (B, N - num_prefix), that sum to 1."""
    of_patches = scores.view(images, -1)[:, num_prefix:]
    return of_patches / of_patches.sum(1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)


def attention_loss(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) of shares (B, patches), mean over the images: L_distill of SaiT."""
    # A share of a float32 softmax may round to 0, whose logarithm must stay finite.
    log_student = student.clamp_min(torch.finfo(student.dtype).tiny).log()
    return F.kl_div(log_student, teacher, reduction="batchmean")


def logit_loss(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) at temperature T, mean over the images (1503.02531)."""
    log_teacher, log_student = ((logits.float() / temperature).log_softmax(1) for logits in (teacher, student))
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


class Lesson(NamedTuple):
    """What a teacher makes of a batch.

    Attributes:
        attention: (B, patches) float32, class attention over the patches, the mean of its last blocks.
        logits: (B, classes).
        features: (B, N, C), tokens after the final norm.
    """

    attention: Tensor
    logits: Tensor
    features: Tensor


class Teacher:
    """A dense model that never learns.

    Its class attention comes from sait_kernels.score_tokens, as a plan that scores at the last blocks and drops
    nothing: no attention matrix is stored.
    """

    def __init__(self, model: nn.Module, blocks: int, dtype: torch.dtype) -> None:
        vit: Any = model
        depth = len(vit.blocks)
        if blocks > depth:
            raise TrainingError(f"config: teacher_blocks: expected at most {depth}, the teacher's depth, got {blocks}.")
        try:
            sparsify(vit, Plan(tuple(Stage(block, keep=1.0) for block in range(depth - blocks, depth)), score="cls"))
        except (TypeError, ValueError) as error:
            raise TrainingError(f"--teacher: its class attention cannot be had: {error}") from error
        self.model = vit.to(dtype).eval().requires_grad_(False)
        self.dtype = dtype

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Lesson:
        """What there is to learn about these images."""
        with (
            record_scores(self.model) as scores,
            last_features(self.model) as features,
            torch.autocast(images.device.type, enabled=False),
        ):
            logits = self.model(images.to(self.dtype))
        shares = [patch_shares(of_block, len(images), self.model.num_prefix_tokens) for of_block in scores]
        return Lesson(torch.stack(shares).mean(0), logits, features[0])


def load_teacher(config: Config, student: Any, device: torch.device) -> Teacher | None:
    """The teacher of a config, or None; TrainingError if it cannot teach this student."""
    name, by_method = config.teacher, config.method_learns_from_teacher
    if name is None and by_method:
        name = config.init  # what the student was, dense
        if name is None:
            raise TrainingError(
                f"--teacher: {config.method} learns from a dense model, and there is none; name one, or give --init a "
                "checkpoint, which then is both the teacher and what the student starts from."
            )
    if name is None or not config.needs_teacher:
        return None
    model: Any
    if timm.is_model(name):
        try:
            model = timm.create_model(name, pretrained=True)
        except Exception as error:  # whatever the network and the hub make of it
            raise TrainingError(f"--teacher: no pretrained {name}: {' '.join(str(error).split())}") from error
    else:
        model = load_checkpoint(name, "--teacher")
    if not hasattr(model, "patch_embed") or not hasattr(model, "blocks"):
        raise TrainingError(f"--teacher: expected a Vision Transformer, got {type(model).__name__}.")
    theirs, ours = model.patch_embed.grid_size, student.patch_embed.grid_size
    if theirs != ours:
        raise TrainingError(f"--teacher: it has {theirs} patches, and the student {ours}; expected as many.")
    if (config.logit_alpha or by_method) and model.num_classes != student.num_classes:
        cure = f"{config.method} needs as many" if by_method else "set logit_alpha to 0"
        raise TrainingError(
            f"--teacher: it tells {model.num_classes} classes apart, and the data has {student.num_classes}; {cure}."
        )
    if by_method and model.embed_dim != student.embed_dim:
        raise TrainingError(
            f"--teacher: it has {model.embed_dim} channels, and the student {student.embed_dim}; {config.method} "
            "compares their features, so name one of as many."
        )
    return Teacher(model.to(device), config.teacher_blocks, torch.bfloat16 if config.amp == "bf16" else torch.float32)


def load_checkpoint(path: str, option: str) -> Any:
    """sait.load, its errors those of an option."""
    try:
        return set_density(checkpoint.load(path))
    except OSError as error:
        raise TrainingError(f"{option}: cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise TrainingError(f"{option}: {error}") from error
