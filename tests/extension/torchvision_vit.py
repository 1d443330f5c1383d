"""A family of another library: torchvision's VisionTransformer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sait
import torch
from sait.families import BlockView, Cost, Family, FeedForward, LinearParameters, entering, register, weights
from torch import Tensor, nn
from torchvision.models.vision_transformer import EncoderBlock, MLPBlock, VisionTransformer


class TorchvisionVit(Family):
    name = "torchvision VisionTransformer"

    def matches(self, cls: type) -> bool:
        return issubclass(cls, VisionTransformer)

    def check(self, model: Any) -> None:
        if type(model).forward is not VisionTransformer.forward:
            raise TypeError(f"sparsify: model: {type(model).__name__} has a forward of its own.")

    def check_block(self, name: str, block: Any) -> None:
        if type(block) is not EncoderBlock or type(block.mlp) is not MLPBlock:
            raise TypeError(f"sparsify: model: {name}: expected torchvision's EncoderBlock.")
        if block.self_attention.dropout != 0:
            raise ValueError(f"sparsify: model: {name}: expected attention_dropout=0.")

    def taken_apart(self, block: Any) -> tuple[nn.Module, ...]:
        return block, block.self_attention

    def bypassed(self, model: Any) -> tuple[nn.Module, ...]:
        return model.encoder, model.encoder.layers

    def blocks(self, model: Any) -> Sequence[nn.Module]:
        return list(model.encoder.layers)

    def view(self, block: Any) -> BlockView:
        attention, nothing = block.self_attention, nn.Identity()
        return BlockView(
            norm1=block.ln_1,
            qkv=LinearParameters(attention.in_proj_weight, attention.in_proj_bias),
            heads=attention.num_heads,
            head_dim=attention.head_dim,
            q_norm=nothing,
            k_norm=nothing,
            norm=nothing,
            gate=None,
            proj=attention.out_proj,
            proj_drop=block.dropout,
            scale1=None,
            drop_path1=nothing,
            norm2=block.ln_2,
            mlp=block.mlp,
            scale2=None,
            drop_path2=nothing,
        )

    def feed_forward(self, mlp: Any) -> FeedForward:
        fc1, act, drop1, fc2, drop2 = mlp
        return FeedForward(fc1, act, fc2, (drop1, drop2))

    def num_prefix(self, model: Any) -> int:
        return 1

    def grid(self, model: Any, size: tuple[int, int] | None = None) -> tuple[int, int]:
        height, width = size or (model.image_size, model.image_size)
        return height // model.patch_size, width // model.patch_size

    def embed(self, model: Any, images: Tensor) -> sait.Tokens:
        patches = model._process_input(images)
        x = torch.cat([model.class_token.expand(len(patches), -1, -1), patches], 1)
        return entering(model.encoder.dropout(x + model.encoder.pos_embedding), 1)

    def norm(self, model: Any) -> nn.Module:
        return model.encoder.ln

    def head(self, model: Any, tokens: sait.Tokens) -> Tensor:
        firsts = tokens.packed.index_select(0, tokens.cu_seqlens[:-1])
        return model.heads(model.encoder.ln(firsts))

    def prefix_is_enough(self, model: Any) -> bool:
        return True

    def embedding_cost(self, model: Any, size: tuple[int, int] | None = None) -> Cost:
        rows, columns = self.grid(model, size)
        kernels, places = model.conv_proj.weight.numel(), model.encoder.pos_embedding.numel()
        moved = 3 * rows * columns * model.patch_size**2 + places
        return Cost("patch embedding", moved, kernels + places, rows * columns * kernels)

    def head_cost(self, model: Any, tokens: float) -> Cost:
        of_head = weights(model.heads)
        return Cost("head", model.hidden_dim, of_head, of_head)


register(TorchvisionVit())
