"""graphed: inference of a model on a GPU by CUDA graphs, so that no launch is paid for from Python."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sait.methods.plan import Plan
from sait.state import Record, State

MOST_GRAPHS = 16  # of one model; the one that was not used for longest goes first


class _Graph(NamedTuple):
    images: Tensor  # what the graph reads
    logits: Tensor  # what it writes
    replay: Callable[[], object]
    record: Record | None  # what it keeps, for sait.selections


class Graphed:
    """A model as captured CUDA graphs, one for each shape, density and autocast; made by ``graphed``."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._graphs: OrderedDict[Any, _Graph] = OrderedDict()
        self._pool: Any = None

    def __call__(self, images: Tensor) -> Tensor:
        """The model's logits, in new memory. Captures a graph with the first call of a shape, dtype, density and
        autocast."""
        check(self.model, images)
        state = getattr(self.model, "_sait", None)
        plan = state.active if isinstance(state, State) else None
        key = (images.shape, images.dtype, images.device, plan, autocast_of(images.device.type))
        graph = self._graphs.get(key)
        if graph is None:
            check_plan(plan)
            graph = self._graphs[key] = self._capture(images, state)
            if len(self._graphs) > MOST_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        with torch.inference_mode():  # as the memory was made: torch forbids writing to it elsewhere
            graph.images.copy_(images)
        graph.replay()
        if isinstance(state, State):
            state.publish(graph.record)
        return graph.logits.clone()

    @torch.inference_mode()
    def _capture(self, images: Tensor, state: Any) -> _Graph:
        taken = images.clone()
        if self._pool is None:
            self._pool = new_pool()
        dtype = autocast_of(images.device.type)
        # Without autocast's cache: a graph would read the casts of weights in it, which go when autocast ends.
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None, cache_enabled=False):
            logits, replay = capture(lambda: self.model(taken), self._pool)
        return _Graph(taken, logits, replay, state.last if isinstance(state, State) else None)


def graphed(model: nn.Module, example: Tensor) -> Graphed:
    """Inference of a model on a GPU by CUDA graphs: one replay in place of some hundred launches.

    What batch 1 needs, whose launches take longer than its kernels. A graph belongs to a shape, a dtype, a density and
    the autocast of the call: the example's is captured at once, others with their first call, and ``sait.set_density``
    changes between them. The graphs read the model's own weights, so a change in place is seen; a weight that is
    replaced is not.

    >>> fast = graphed(model, images)                                       # doctest: +SKIP
    >>> logits = fast(images)                                               # doctest: +SKIP

    Args:
        model: sparse or not, in eval mode, on a GPU. A density that depends on data needs ``static=True``, whose sizes
            do not.
        example: a batch of images as the model takes it, on the same GPU.

    Returns:
        A callable from images to logits; its result is not differentiable.

    Raises:
        ValueError, TypeError: the model is not on a GPU, or in training mode, or its density has no static size.
    """
    fast = Graphed(model)
    fast(example)
    return fast


def autocast_of(device: str) -> torch.dtype | None:
    """The dtype of autocast on a kind of device, or None where it is off."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def check(model: nn.Module, images: Tensor) -> None:
    if not isinstance(images, Tensor):
        raise TypeError(f"graphed: example: expected a batch of images as a Tensor, got {type(images).__name__}.")
    if not images.is_cuda:
        raise ValueError(
            f"graphed: example: expected images on a GPU, got {images.device}. A CPU has no graphs: call the model."
        )
    if model.training:
        raise ValueError("graphed: model: expected eval mode, got training mode. Call model.eval().")


def check_plan(plan: Plan | None) -> None:
    if plan is not None and plan.gated:
        raise ValueError(
            "graphed: density: expected sizes that do not depend on data, got gates, by which images decide what runs. "
            "Call the model without a graph, or take another plan."
        )
    if plan is not None and plan.ragged and not plan.static:
        raise ValueError(
            "graphed: density: expected sizes that do not depend on data, got mass. "
            "Pass max_keep and static=True: sait.set_density(model, mass=0.9, max_keep=100, static=True)."
        )


def new_pool() -> Any:
    return torch.cuda.graph_pool_handle()


def capture(run: Callable[[], Tensor], pool: Any) -> tuple[Tensor, Callable[[], object]]:
    """(the tensor that a replay writes, the replay). A warm-up on a side stream compiles and allocates."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = run()
    return result, graph.replay
