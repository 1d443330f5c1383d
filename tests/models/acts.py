"""What people and their tools do to a model: each act does the same to any of the same shape, given the same dice."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from random import Random
from typing import Any

import sait
import torch
from timm.layers import LayerScale
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import weight_norm

Act = Callable[[Any, Random], Any]
LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
LEAVES = ("norm1", "norm2", "ls1", "ls2", "drop_path1", "drop_path2", "attn.q_norm", "attn.proj_drop", "attn.norm")
LEAVES += ("mlp", "mlp.act", "mlp.drop1", "mlp.norm", *LINEARS)
APART = ("", "attn")


def block_of(model: Any, dice: Random) -> Any:
    return model.blocks[dice.randrange(len(model.blocks))]


def part_of(model: Any, dice: Random, paths: tuple[str, ...]) -> Any:
    block = block_of(model, dice)
    path = dice.choice(paths)
    return block.get_submodule(path) if path else block


def linear_of(model: Any, dice: Random) -> Any:
    """A linear layer that still is one."""
    found = part_of(model, dice, LINEARS)
    return found if isinstance(found, nn.Linear) and isinstance(getattr(found, "weight", None), nn.Parameter) else None


def noise(like: Tensor, dice: Random) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(dice.randrange(10**6))).to(like.dtype)


# Hooks


def hook_on_a_leaf(model: Any, dice: Random) -> None:
    part_of(model, dice, LEAVES).register_forward_hook(lambda _, __, out: out * 0.5)


def pre_hook_on_a_leaf(model: Any, dice: Random) -> None:
    part_of(model, dice, LEAVES).register_forward_pre_hook(lambda _, args: (args[0] * 0.5, *args[1:]))


def hook_that_is_removed(model: Any, dice: Random) -> None:
    part_of(model, dice, LEAVES + APART).register_forward_hook(lambda _, __, out: out * 0.5).remove()


def hook_on_a_block(model: Any, dice: Random) -> None:
    part_of(model, dice, APART).register_forward_hook(lambda _, __, out: out * 0.5)


def hook_on_the_blocks(model: Any, dice: Random) -> None:
    model.blocks.register_forward_hook(lambda _, __, out: out * 0.5)


def hook_on_the_model(model: Any, dice: Random) -> None:
    model.register_forward_hook(lambda _, __, out: out * 2)


# Weights


def in_place(model: Any, dice: Random) -> None:
    if (layer := linear_of(model, dice)) is not None:
        layer.weight.mul_(-0.5)


def through_data(model: Any, dice: Random) -> None:
    if (layer := linear_of(model, dice)) is not None:
        layer.weight.data.add_(0.1 * noise(layer.weight, dice))


def other_data(model: Any, dice: Random) -> None:
    if (layer := linear_of(model, dice)) is not None:
        layer.weight.data = 0.5 * layer.weight.data


def through_numpy(model: Any, dice: Random) -> None:
    if (layer := linear_of(model, dice)) is not None:
        layer.weight.detach().numpy()[...] *= 0.7


def replaced_parameter(model: Any, dice: Random) -> None:
    if (layer := linear_of(model, dice)) is not None:
        layer.weight = nn.Parameter(0.7 * layer.weight.detach())


def without_bias(model: Any, dice: Random) -> None:
    if (layer := linear_of(model, dice)) is not None:
        layer.bias = None


def norms_change(model: Any, dice: Random) -> None:
    norm = part_of(model, dice, ("norm1", "norm2"))
    if isinstance(getattr(norm, "weight", None), nn.Parameter):
        norm.weight.mul_(0.5)


def frozen(model: Any, dice: Random) -> None:
    model.requires_grad_(dice.random() < 0.5)


def loaded(model: Any, dice: Random) -> None:
    state = {key: value * 0.9 if value.is_floating_point() else value for key, value in model.state_dict().items()}
    model.load_state_dict(state, assign=dice.random() < 0.5)


def optimizer_step(model: Any, dice: Random) -> None:
    kind = dice.choice([torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
    how = dice.choice([{"fused": True}, {"foreach": True}, {}])
    parameters = [parameter for parameter in model.parameters() if parameter.is_leaf]
    for parameter in parameters:
        parameter.requires_grad_(True)
        parameter.grad = noise(parameter, dice)
    kind(parameters, lr=1e-2, **how).step()
    for parameter in parameters:
        parameter.grad = None


def rounded_weights(model: Any, dice: Random) -> Any:
    return model.bfloat16().float()


def trained_and_back(model: Any, dice: Random) -> None:
    model.train().eval()


# Surgery


class Other(Attention):
    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return 0.5 * x


class Adapter(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean(-1, keepdim=True)


class Beside(nn.Module):
    """A low-rank adapter around a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) * 1.5


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def other_attention(model: Any, dice: Random) -> None:
    block_of(model, dice).attn.__class__ = Other


def adapter_by_class(model: Any, dice: Random) -> None:
    if (layer := linear_of(model, dice)) is not None and type(layer) is nn.Linear:
        layer.__class__ = Adapter


def adapter_around(model: Any, dice: Random) -> None:
    block, path = block_of(model, dice), dice.choice(LINEARS)
    block.set_submodule(path, Beside(block.get_submodule(path)))


def own_forward_of_a_leaf(model: Any, dice: Random) -> None:
    part_of(model, dice, ("norm1", "norm2", "ls1", "attn.q_norm")).forward = lambda x: 0.3 * x


def own_forward_of_attention(model: Any, dice: Random) -> None:
    part_of(model, dice, APART).forward = lambda x, **_: 0.3 * x


def other_activation(model: Any, dice: Random) -> None:
    block_of(model, dice).mlp.act = dice.choice([nn.ReLU, nn.SiLU, lambda: nn.GELU("tanh")])().eval()


def other_norm(model: Any, dice: Random) -> None:
    setattr(block_of(model, dice), dice.choice(("norm1", "norm2")), nn.LayerNorm(64, eps=1e-2).eval())


def other_eps(model: Any, dice: Random) -> None:
    part_of(model, dice, ("norm1", "norm2")).eps = 0.1


def other_drop(model: Any, dice: Random) -> None:
    block_of(model, dice).attn.proj_drop = nn.Tanh().eval()


def other_scale(model: Any, dice: Random) -> None:
    scale = LayerScale(64, init_values=0.3).eval()
    setattr(block_of(model, dice), dice.choice(("ls1", "ls2")), scale)


def mixing_norm(model: Any, dice: Random) -> None:
    block_of(model, dice).norm2 = nn.Softmax(dim=1)


def attention_scale(model: Any, dice: Random) -> None:
    attn = block_of(model, dice).attn
    attn.scale, attn.fused_attn = 0.01, False


def swapped_blocks(model: Any, dice: Random) -> None:
    i, j = dice.sample(range(len(model.blocks)), 2)
    model.blocks[i], model.blocks[j] = model.blocks[j], model.blocks[i]


def shared_block(model: Any, dice: Random) -> None:
    i, j = dice.sample(range(len(model.blocks)), 2)
    model.blocks[i] = model.blocks[j]


def without_a_block(model: Any, dice: Random) -> None:
    model.blocks[dice.randrange(len(model.blocks))] = nn.Identity()


def pruned(model: Any, dice: Random) -> None:
    layer = linear_of(model, dice)
    if layer is not None:
        prune.l1_unstructured(layer, "weight", amount=0.5)
        if dice.random() < 0.5:
            prune.remove(layer, "weight")


def pruned_norm(model: Any, dice: Random) -> None:
    norm = part_of(model, dice, ("norm1", "norm2"))
    if isinstance(getattr(norm, "weight", None), nn.Parameter):
        prune.l1_unstructured(norm, "weight", 0.5)


def parametrized(model: Any, dice: Random) -> None:
    part = part_of(model, dice, ("norm1", "norm2", *LINEARS))
    if isinstance(getattr(part, "weight", None), nn.Parameter):
        parametrize.register_parametrization(part, "weight", Half())


def normalised_weight(model: Any, dice: Random) -> None:
    if (layer := linear_of(model, dice)) is not None:
        weight_norm(layer)


def parametrized_model(model: Any, dice: Random) -> None:
    if not parametrize.is_parametrized(model, "pos_embed"):
        parametrize.register_parametrization(model, "pos_embed", Half())


def statistics(model: Any, dice: Random) -> None:
    """As Wanda and SmoothQuant leave them: tensors and arrays as attributes."""
    part = part_of(model, dice, LEAVES + APART)
    part.scaler_row, part.history = torch.ones(3), [torch.ones(2).numpy()]


# Whole models


def checkpointed_block(model: Any, dice: Random) -> None:
    i = dice.randrange(len(model.blocks))
    model.blocks[i] = checkpoint_wrapper(model.blocks[i])


def checkpointed_model(model: Any, dice: Random) -> None:
    model.set_grad_checkpointing(True)


def compiled_block(model: Any, dice: Random) -> None:
    part_of(model, dice, APART).compile(backend="eager")


def copied(model: Any, dice: Random) -> Any:
    return copy.deepcopy(model)


def pickled(model: Any, dice: Random) -> Any:
    try:
        return pickle.loads(pickle.dumps(model))
    except (AttributeError, TypeError, RuntimeError, pickle.PicklingError):
        return None  # a lambda of another act, or a parametrisation, which torch does not pickle


def stored(model: Any, dice: Random) -> Any:
    try:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=False)
    except (AttributeError, TypeError, RuntimeError, pickle.PicklingError):
        return None


def gradients_taken(model: Any, dice: Random) -> None:
    with torch.enable_grad():
        try:
            model(torch.ones(1, 3, 80, 80)).sum().backward()
        except (RuntimeError, TypeError, ValueError):
            return
    for parameter in model.parameters():
        parameter.grad = None


def threads(model: Any, dice: Random) -> None:
    def run() -> None:
        try:
            with torch.inference_mode():
                model(torch.ones(1, 3, 80, 80))
        except (RuntimeError, TypeError, ValueError):
            return

    started = [threading.Thread(target=run) for _ in range(2)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()


# What is done to sparse models only


def optimized_again(model: Any, dice: Random) -> None:
    if hasattr(model, "_sait"):
        (sait.optimize if dice.random() < 0.7 else sait.deoptimize)(model)


def another_plan(model: Any, dice: Random) -> None:
    block = dice.randrange(4)
    if hasattr(model, "_sait"):
        sait.sparsify(model, block=block, keep=dice.choice([0.3, 0.6]))


def another_density(model: Any, dice: Random) -> None:
    density = dice.choice([{"keep": 0.3}, {"mass": 0.6}, {"keep": 1.0}])
    if hasattr(model, "_sait"):
        sait.set_density(model, **density)


ACTS: tuple[Act, ...] = (
    *(hook_on_a_leaf, pre_hook_on_a_leaf, hook_that_is_removed, hook_on_a_block, hook_on_the_blocks),
    *(hook_on_the_model, in_place, through_data, other_data, through_numpy, replaced_parameter, without_bias),
    *(norms_change, frozen, loaded, optimizer_step, rounded_weights, trained_and_back, other_attention),
    *(adapter_by_class, adapter_around, own_forward_of_a_leaf, own_forward_of_attention, other_activation, other_norm),
    *(other_eps, other_drop, other_scale, mixing_norm, attention_scale, swapped_blocks, shared_block, without_a_block),
    *(pruned, pruned_norm, parametrized, normalised_weight, parametrized_model, statistics, checkpointed_block),
    *(checkpointed_model, compiled_block, copied, pickled, stored, gradients_taken, threads),
    *(optimized_again, another_plan, another_density),
)
