"""CageViT (2305.09924): ahead of the encoder a small CNN says which patches are major; the minor become a few rows.

What its abstract leaves open is ours, and said where it is: what the CNN looks at, its layers, how many classes count,
and how the minor patches are weighed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sait_kernels as sk
from sait.methods.base import Seen, Trained, register
from sait.tokens import Sizes, Tokens
from sait_kernels import Selection


@register("activation_map")
class ActivationMap(nn.Module):
    """The activation map of a small CNN on an image's patches: s_i = sum_c p_c relu(sum_k w_ck F_ki), over the ``top``
    classes c that it thinks most probable.

    The CNN: LayerNorm of each patch, two convolutions of 3 x 3 with ReLU, whose result is F, the mean over the patches,
    and a linear layer w to the classes. Behind a mean and a linear layer Grad-CAM needs no gradient: the gradient of a
    logit by F_ki is w_ck / patches everywhere, so its map is the one above, which is CAM's (1512.04150), but for that
    constant.

    Ours: the CNN looks at the embedded patches, of which the patch embedding is its first convolution. No gradient goes
    back to them: the CNN learns by its own loss of the labels (CageLosses), and that loss changes nothing else.

    Args:
        channels: of the rows.
        classes: that it tells apart.
        hidden: channels of the CNN.
        top: how many classes count; no more than there are do.

    Raises:
        ValueError, TypeError: one that is no int of 1 or more.
    """

    reads = ("x",)
    of_patches = True

    def __init__(self, channels: int, classes: int, hidden: int = 64, top: int = 5) -> None:
        super().__init__()
        check_counts("ActivationMap", channels=channels, classes=classes, hidden=hidden, top=top)
        self.channels, self.classes, self.hidden, self.top = channels, classes, hidden, top
        self.norm = nn.LayerNorm(channels)
        self.first = nn.Conv2d(channels, hidden, 3, padding=1)
        self.second = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.answer = nn.Linear(hidden, classes)

    def forward(self, seen: Seen) -> Tensor:
        """(T,) float32: the map; 0 for prefix rows.

        Raises:
            ValueError: patches are missing, or nobody has said how they lie.
        """
        features = self.features(seen)  # (B, hidden, rows, columns)
        logits = self.answer(features.mean((2, 3)))
        of_classes = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(1)
        chances, classes = of_classes.topk(min(self.top, self.classes), 1)
        maps = (self.answer.weight[classes] @ features.flatten(2)).relu()  # (B, top, patches)
        scores = (chances[:, :, None] * maps).sum(1)
        return F.pad(scores, (seen.tokens.num_prefix, 0)).flatten()

    def features(self, seen: Seen) -> Tensor:
        """(B, hidden, rows, columns): what the convolutions give, above 0."""
        tokens = seen.tokens
        rows, columns = tokens.grid or (0, 0)
        if tokens.rows is not None or tokens.max_seqlen != tokens.num_prefix + rows * columns:
            raise ValueError(
                f"ActivationMap: expected all patches of each image, on a grid, got {tokens.max_seqlen} tokens of a "
                f"grid of {rows} x {columns}. Put its stage ahead of all that drop some."
            )
        normed = self.norm(seen.x.detach()).view(tokens.images, tokens.max_seqlen, self.channels)
        x = normed[:, tokens.num_prefix :].mT.unflatten(2, (rows, columns))
        return self.second(self.first(x).relu()).relu()

    def config(self) -> dict[str, Any]:
        return {"channels": self.channels, "classes": self.classes, "hidden": self.hidden, "top": self.top}

    def macs(self, tokens: float, width: int, channels: int) -> float:
        """Multiply-accumulates for an image of so many patches."""
        top = min(self.top, self.classes)
        return tokens * self.hidden * (9 * channels + 9 * self.hidden + top) + self.hidden * self.classes

    def __str__(self) -> str:
        return f"ActivationMap(hidden={self.hidden}, top={self.top})"


@register("new_activation_map")
@dataclass(frozen=True)
class NewActivationMap:
    """Stands for an ActivationMap in a plan that knows no model yet: sparsify puts the one in its place that the model
    has at this block, or a new one of the model's width and classes.

    Attributes:
        hidden, top: as of an ActivationMap.

    Raises:
        ValueError, TypeError: one that is no int of 1 or more.
    """

    hidden: int = 64
    top: int = 5
    reads = ("x",)
    makes = ActivationMap

    def __post_init__(self) -> None:
        check_counts("NewActivationMap", hidden=self.hidden, top=self.top)

    def for_model(self, sizes: Sizes) -> ActivationMap:
        if not sizes.classes:
            raise ValueError("ActivationMap: model: expected one with a head that tells classes apart, got none.")
        return ActivationMap(sizes.channels, sizes.classes, self.hidden, self.top)

    def __call__(self, seen: Seen) -> Tensor:
        raise TypeError("NewActivationMap: it has no weights yet. Call sait.sparsify(model, plan), which makes them.")


@register("fuse_learned")
class FuseLearned(nn.Module):
    """The dropped rows of an image become ``rows`` rows behind those that stay: row m is sum_j a_mj x_j, where a_m is a
    softmax over the dropped rows j of q_m . LayerNorm(x_j), and q_m is learned.

    Ours: the abstract says no more than that the minor tokens are fused. The new rows have no position, and count as
    one patch each. Where nothing is dropped, nothing is fused.

    Args:
        channels: of the rows.
        rows: how many an image gets.

    Raises:
        ValueError, TypeError: one that is no int of 1 or more.
    """

    needs_dropped = True

    def __init__(self, channels: int, rows: int = 4) -> None:
        super().__init__()
        check_counts("FuseLearned", channels=channels, rows=rows)
        self.channels, self.adds = channels, rows
        self.queries = nn.Linear(channels, rows, bias=False)  # the same for all rows is nothing in a softmax over them
        nn.init.normal_(self.queries.weight, std=channels**-0.5)

    def forward(self, x: Tensor, scores: Tensor, selection: Selection, tokens: Tokens) -> Tokens:
        """The kept rows and the fused ones.

        Raises:
            ValueError: images keep different numbers of rows.
        """
        B, N, K, M = tokens.images, tokens.max_seqlen, selection.max_seqlen, self.adds
        if tokens.ragged:
            raise ValueError(
                "FuseLearned: expected as many rows of each image, got different numbers. Take sait.methods.TopK, "
                "and put no stage with a mass ahead of it."
            )
        if K == N:
            return tokens.keep(selection, x)
        total = x.shape[0]  # the number of all rows is no row
        stays = torch.zeros(total, dtype=torch.bool, device=x.device).index_fill(0, selection.indices.long(), True)
        logits = self.queries(F.layer_norm(x, (self.channels,))).view(B, N, M).mT
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        weights = logits.masked_fill(stays.view(B, 1, N), -math.inf).softmax(2)
        fused = weights.to(x.dtype) @ x.view(B, N, self.channels)
        rows = torch.cat([selection.indices.view(B, K), selection.indices.new_full((B, M), total)], 1)
        left = Selection(rows.flatten(), sk.uniform_cu_seqlens(B, K + M, x.device), K + M)
        both = torch.cat([sk.gather_tokens(x, selection).view(B, K, self.channels), fused], 1)
        return tokens.keep(left, both.flatten(0, 1))

    def config(self) -> dict[str, Any]:
        return {"channels": self.channels, "rows": self.adds}

    def macs(self, tokens: float, channels: int) -> float:
        """Multiply-accumulates for an image of so many rows, those that stay among them."""
        return 2 * tokens * channels * self.adds

    def __str__(self) -> str:
        return f"FuseLearned({self.adds})"


@register("new_fuse_learned")
@dataclass(frozen=True)
class NewFuseLearned:
    """Stands for a FuseLearned in a plan that knows no model yet: sparsify puts the one in its place that the model has
    at this block, or a new one of the model's width.

    Attributes:
        rows: as of a FuseLearned.

    Raises:
        ValueError, TypeError: it is no int of 1 or more.
    """

    rows: int = 4
    needs_dropped = True
    makes = FuseLearned

    def __post_init__(self) -> None:
        check_counts("NewFuseLearned", rows=self.rows)

    def for_model(self, sizes: Sizes) -> FuseLearned:
        return FuseLearned(sizes.channels, self.rows)

    def __call__(self, x: Tensor, scores: Tensor, selection: Selection, tokens: Tokens) -> Tokens:
        raise TypeError("NewFuseLearned: it has no weights yet. Call sait.sparsify(model, plan), which makes them.")


def check_counts(where: str, **counts: int) -> None:
    """TypeError or ValueError unless each is an int of 1 or more."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{where}: {name}: expected an int, got {value!r}. Pass a number such as 4.")
        if value < 1:
            raise ValueError(f"{where}: {name}: expected 1 or more, got {value}.")


@dataclass(frozen=True)
class CageLosses:
    """What CageViT adds to the loss of the labels: that of the CNN's own answer, by which alone it learns.

    Attributes:
        weight: what it counts. Under Adam and the clipping of ``sait train`` it changes little: no other loss reaches
            the CNN.

    Raises:
        ValueError, TypeError: weight is no finite number above 0.
    """

    weight: float = 1.0
    needs_teacher: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.weight, bool) or not isinstance(self.weight, (int, float)):
            raise TypeError(f"CageLosses: weight: expected a number, got {self.weight!r}.")
        if not 0 < self.weight < math.inf:
            raise ValueError(f"CageLosses: weight: expected a finite number above 0, got {self.weight}.")

    @property
    def weights(self) -> Mapping[str, float]:
        return {"map_loss": float(self.weight)}

    def __call__(self, step: Trained) -> dict[str, Tensor]:
        """The loss by its name, the mean over the stages, without its weight.

        Raises:
            ValueError: the step has no labels, or not the answers of all stages.
        """
        wanted = [f"scorer{stage.block}" for stage in step.plan.stages if isinstance(stage.scorer, ActivationMap)]
        missing = [name for name in wanted if name not in step.answers]
        if step.labels is None or missing:
            lacking = "labels" if step.labels is None else f"the answers of {', '.join(missing)}"
            raise ValueError(f"CageLosses: expected labels and answers in the step, got it without {lacking}.")
        losses = [F.cross_entropy(step.answers[name].float(), step.labels) for name in wanted]
        return {"map_loss": torch.stack(losses).mean()}
