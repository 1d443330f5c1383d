"""DynamicViT (2106.02034): predictors that learn which patches stay, and the losses that teach them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sait.methods.base import Seen, Trained, register
from sait.methods.policy import mean_of_patches
from sait.tokens import Sizes


@register("dynamicvit")
class Predictor(nn.Module):
    """The logarithm of the probability that a patch stays, of the rows ahead of a block.

    h = GELU(Linear(LN x)), C channels; beside the first half of a row's h stands the mean of the second halves of its
    image's patches, those that are there by the policy; then Linear to C/2, GELU, C/4, GELU, 2, and log-softmax. The
    first of the two is "stays".

    In training mode nothing is dropped: ``mask`` draws which patches stay, and later attention is masked by that
    (sait.methods.policy).

    Args:
        channels: C, of the block's input; a multiple of 4.

    Raises:
        ValueError, TypeError: channels is no such number.
    """

    reads = ("x",)

    def __init__(self, channels: int) -> None:
        super().__init__()
        if isinstance(channels, bool) or not isinstance(channels, int):
            raise TypeError(f"Predictor: channels: expected an int, got {channels!r}. Pass the width of the model.")
        if channels < 4 or channels % 4:
            raise ValueError(f"Predictor: channels: expected a multiple of 4, got {channels}.")
        self.channels = channels
        self.norm = nn.LayerNorm(channels)
        self.hidden = nn.Linear(channels, channels)
        self.first = nn.Linear(channels, channels // 2)
        self.second = nn.Linear(channels // 2, channels // 4)
        self.out = nn.Linear(channels // 4, 2)
        for layer in (self.hidden, self.first, self.second, self.out):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, seen: Seen) -> Tensor:
        return self.log_probabilities(seen)[:, 0]

    def log_probabilities(self, seen: Seen) -> Tensor:
        """(T, 2) float32: of staying, and of going; of prefix rows they mean nothing."""
        local, shared = F.gelu(self.hidden(self.norm(seen.x))).chunk(2, 1)
        shared = mean_of_patches(shared, seen.tokens).to(local.dtype)
        hidden = F.gelu(self.first(torch.cat([local, shared], 1)))
        scores = self.out(F.gelu(self.second(hidden)))
        return scores.to(torch.promote_types(seen.x.dtype, torch.float32)).log_softmax(1)

    def mask(self, seen: Seen) -> Tensor:
        """(T,): 1 for a patch that stays and 0 for one that goes, drawn by its probability (Gumbel-softmax, straight
        through: the gradient is that of the soft choice). A patch that has gone does not come back."""
        log_probabilities = self.log_probabilities(seen)
        noise = -torch.empty_like(log_probabilities).exponential_().log()
        soft = (log_probabilities + noise).softmax(1)[:, 0]
        drawn = (soft > 0.5).to(soft.dtype) + (soft - soft.detach())  # exactly 0 or 1
        return drawn if seen.tokens.policy is None else seen.tokens.policy * drawn

    def config(self) -> dict[str, Any]:
        return {"channels": self.channels}

    @staticmethod
    def macs(tokens: float, width: int, channels: int) -> float:
        """Multiply-accumulates for an image."""
        C = channels
        return tokens * (C * C + C * (C // 2) + (C // 2) * (C // 4) + (C // 4) * 2)

    def __str__(self) -> str:
        return f"Predictor({self.channels})"


@register("new_dynamicvit")
@dataclass(frozen=True)
class NewPredictor:
    """Stands for a Predictor in a plan that knows no model yet: sparsify puts the one in its place that the model has
    at this block, or a new one of the model's width."""

    reads = ("x",)
    makes = Predictor

    def for_model(self, sizes: Sizes) -> Predictor:
        return Predictor(sizes.channels)

    def macs(self, tokens: float, width: int, channels: int) -> float:
        return Predictor.macs(tokens, width, channels)

    def __call__(self, seen: Seen) -> Tensor:
        raise TypeError("NewPredictor: it has no weights yet. Call sait.sparsify(model, plan), which makes them.")


@dataclass(frozen=True)
class DynamicLosses:
    """What DynamicViT adds to the loss of the labels, with what each counts in ``weights``.

    - ratio: mean over images and stages of (mean of the patches' policy - share of the stage)^2;
    - answer: KL(student || teacher) of the logits, as the paper has it; its code has KL(teacher || student);
    - token: mean squared difference to the teacher's final features, over the patches that all stages keep, and over
      their channels. Which patches these are has no gradient, as in the paper's code.
    """

    weights: ClassVar[Mapping[str, float]] = {"ratio_loss": 2.0, "answer_loss": 0.5, "token_loss": 0.5}
    needs_teacher: ClassVar[bool] = True

    def __call__(self, step: Trained) -> dict[str, Tensor]:
        """Each loss by its name, without its weight.

        Raises:
            ValueError: there are no policies: the model is not in training mode.
        """
        shares = [stage.selector.of_first for stage in step.plan.stages]
        policies = [scores.view(step.features.shape[:2])[:, step.num_prefix :] for scores in step.scores]
        if len(policies) != len(shares):
            raise ValueError(
                f"DynamicLosses: expected the policies of {len(shares)} stages, got {len(policies)}. Call "
                "model.train(), and the model inside sait.record_scores."
            )
        assert step.teacher_logits is not None
        assert step.teacher_features is not None
        ours = step.features[:, step.num_prefix :]
        theirs = step.teacher_features[:, step.teacher_prefix :]
        return {
            "ratio_loss": ratio_loss(policies, shares),
            "answer_loss": answer_loss(step.logits, step.teacher_logits),
            "token_loss": token_loss(ours, theirs, policies[-1]),
        }


def ratio_loss(policies: list[Tensor], shares: list[float]) -> Tensor:
    """Mean over stages and images of (mean D - share)^2, of policies (B, patches)."""
    return torch.stack([(D.mean(1) - share).square().mean() for D, share in zip(policies, shares, strict=True)]).mean()


def answer_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(student || teacher) of logits (B, classes), mean over the images."""
    student, teacher = (logits.float().log_softmax(1) for logits in (student, teacher))
    return F.kl_div(teacher, student, reduction="batchmean", log_target=True)


def token_loss(student: Tensor, teacher: Tensor, policy: Tensor) -> Tensor:
    """Mean squared difference of features (B, patches, C) where the policy (B, patches) is 1; 0 where it never is."""
    squares = (student.float() - teacher.float()).square().mean(2)
    kept = policy.detach()
    return (squares * kept).sum() / kept.sum().clamp_min(1.0)
