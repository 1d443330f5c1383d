"""AdaViT (2111.15668): gates that learn which tokens, heads and sub-layers an image needs, and the losses for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sait.methods.base import On, Seen, Trained, register
from sait.tokens import Sizes

TEMPERATURE = 5.0  # of the Gumbel-sigmoid
OPEN = 2.0  # the logit that new gates begin with


@register("adavit")
class AdaGates(nn.Module):
    """What of a block runs for an image, by three linear layers on the block's input: a logit for each token, and from
    the class token one for each head, one for the attention and one for the MLP.

    In eval mode a gate is on where the sigmoid of its logit is at least 0.5. In training mode it is drawn: with two
    Gumbel noises g and the logit l it is on where sigmoid((l + g1 - g2) / 5) is above 0.5, and its gradient is that of
    this sigmoid (straight through).

    New ones are on with a probability near sigmoid(2) = 0.88, so that a trained model begins as nearly itself; that is
    ours, and not the paper's.

    Args:
        channels: C, of the block's input.
        heads: of the block.

    Raises:
        ValueError, TypeError: one of them is no whole number above 0.
    """

    switches = ("tokens", "heads", "layers")
    needs_prefix = True

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("heads", heads)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"AdaGates: {name}: expected an int, got {value!r}. Pass that of the model.")
            if value < 1:
                raise ValueError(f"AdaGates: {name}: expected 1 or more, got {value}. Pass that of the model.")
        self.channels, self.number = channels, heads
        self.tokens, self.heads, self.layers = (nn.Linear(channels, n) for n in (1, heads, 2))
        for layer in (self.tokens, self.heads, self.layers):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.constant_(layer.bias, OPEN)

    def forward(self, seen: Seen, heads: int) -> On:
        return On(*(drawn(logit) if self.training else logit >= 0 for logit in self.logits(seen)))

    def logits(self, seen: Seen) -> tuple[Tensor, Tensor, Tensor]:
        """(T,) of tokens, (B, H) of heads and (B, 2) of attention and MLP, float32."""
        firsts = seen.x.index_select(0, seen.tokens.cu_seqlens[:-1])
        kind = torch.promote_types(seen.x.dtype, torch.float32)
        tokens = self.tokens(seen.x).squeeze(1)
        return tokens.to(kind), self.heads(firsts).to(kind), self.layers(firsts).to(kind)

    def check(self, channels: int, heads: int) -> None:
        """ValueError if a block is of other sizes."""
        if (channels, heads) != (self.channels, self.number):
            raise ValueError(
                f"sait: gates: expected a block of {self.channels} channels and {self.number} heads, which {self} was "
                f"made for, got one of {channels} and {heads}. Pass sait.methods.NewGates(), and train them."
            )

    def config(self) -> dict[str, Any]:
        return {"channels": self.channels, "heads": self.number}

    @staticmethod
    def macs(tokens: float, channels: int, heads: int) -> float:
        """Multiply-accumulates for an image."""
        return tokens * channels + channels * (heads + 2)

    def __str__(self) -> str:
        return f"AdaGates({self.channels}, {self.number})"


def drawn(logits: Tensor) -> Tensor:
    """0 or 1 by the probability sigmoid(logit): Gumbel-sigmoid, straight through."""
    noise = [-torch.empty_like(logits).exponential_().log() for _ in range(2)]
    soft = ((logits + noise[0] - noise[1]) / TEMPERATURE).sigmoid()
    return (soft > 0.5).to(soft.dtype) + (soft - soft.detach())  # exactly 0 or 1


@register("new_adavit")
@dataclass(frozen=True)
class NewGates:
    """Stands for AdaGates in a plan that knows no model yet: sparsify puts those in its place that the model has at
    this block, or new ones of the model's width and heads."""

    switches = AdaGates.switches
    needs_prefix = True
    makes = AdaGates

    def for_model(self, sizes: Sizes) -> AdaGates:
        return AdaGates(sizes.channels, sizes.heads)

    def macs(self, tokens: float, channels: int, heads: int) -> float:
        return AdaGates.macs(tokens, channels, heads)

    def __call__(self, seen: Seen, heads: int) -> On:
        raise TypeError("NewGates: they have no weights yet. Call sait.sparsify(model, plan), which makes them.")


@dataclass(frozen=True)
class AdaLosses:
    """What AdaViT adds to the loss of the labels, each twice: |mean of the heads' gates - g|, |mean of the sub-layers'
    gates - g| and (mean of the patches' gates - g)^2, over the images of the batch and all blocks that have gates.

    Attributes:
        share: g, what is to be on.
    """

    share: float
    weights: ClassVar[Mapping[str, float]] = {"heads_loss": 2.0, "layers_loss": 2.0, "tokens_loss": 2.0}
    needs_teacher: ClassVar[bool] = False

    def __call__(self, step: Trained) -> dict[str, Tensor]:
        """Each loss by its name, without its weight.

        Raises:
            ValueError: there are no gates: nobody has recorded them.
        """
        if not step.gates:
            raise ValueError(
                "AdaLosses: expected the gates of a step, got none. Call the model inside sait.record_gates."
            )
        tokens, heads, layers = (torch.stack(found).float() for found in zip(*step.gates, strict=True))
        patches = tokens.view(len(tokens), len(step.logits), -1)[:, :, step.num_prefix :]
        return {
            "heads_loss": (heads.mean() - self.share).abs(),
            "layers_loss": (layers.mean() - self.share).abs(),
            "tokens_loss": (patches.mean() - self.share).square(),
        }
