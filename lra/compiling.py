"""torch.compile by parts: what comes before the layers, one layer, what comes behind them; each once.

All layers run one function, and parameters are inputs of compiled code, so one compilation serves them all: the start
of a run does not grow with the depth. Nothing is lost to it: what the compiler merges lies within a layer.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from lra.model import Classifier, Layer, Parts, Rows, Started
from lra.objective import Objective
from lra.packing import Packed
from tasks.batches import Batch


def compile_parts(objective: Objective, traced_whole: bool, whole_vary: bool = False) -> None:
    """Let the objective and its model run by compiled code, one for every number of rows where lengths vary.

    `traced_whole`: raise where anything in a layer cannot be traced, instead of running that part plainly.
    `whole_vary`: the number of rows varies also among batches whose sequences are all of one length.
    """
    # The compiler looks at the gradients of what it is given, and a layer's input is no parameter.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf Tensor")
    # Advice to change what the recipe fixes (float32 stays float32), and a choice of the compiler's own.
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
    warnings.filterwarnings("ignore", message="\\s*Online softmax is disabled")
    start: Callable[..., Started] = torch.compile(Classifier.start, fullgraph=True)
    layer: Callable[..., Tensor] = torch.compile(Layer.forward, fullgraph=traced_whole)
    predict: Callable[..., Tensor] = torch.compile(Classifier.predict, fullgraph=True)
    loss: Callable[..., Tensor] = torch.compile(Objective.loss, fullgraph=True)

    def run_start(model: Classifier, batch: Batch, hidden_T: Tensor | None) -> Started:
        rows_vary(batch.uniform and not whole_vary, batch.tokens_T, batch.positions_T, hidden_T)
        if batch.keys is not None:
            rows_vary(False, batch.keys.index_K)
        return start(model, batch, hidden_T)

    def run_layer(one: Layer, x_TE: Tensor, rows: Rows, seed: Tensor) -> Tensor:
        packed, keys, turn, log_weight_T = rows
        rows_vary(packed.is_uniform and not whole_vary, x_TE, packed.padded_row_T, log_weight_T, *(turn or ()))
        if keys is not None:
            rows_vary(False, keys.index_K, keys.packed.padded_row_T)
        return layer(one, x_TE, rows, seed)

    def run_predict(model: Classifier, x_TE: Tensor, packed: Packed) -> Tensor:
        rows_vary(packed.is_uniform and not whole_vary, x_TE, packed.padded_row_T)
        return predict(model, x_TE, packed)

    def run_loss(own: Objective, x_TE: Tensor, packed: Packed, batch: Batch, hidden_T: Tensor | None) -> Tensor:
        rows_vary(
            packed.is_uniform and not whole_vary, x_TE, packed.padded_row_T, batch.tokens_T, batch.positions_T, hidden_T
        )
        if batch.keys is not None:
            rows_vary(False, batch.keys.index_K)
        return loss(own, x_TE, packed, batch, hidden_T)

    objective.model.parts = Parts(run_start, run_layer, run_predict)
    objective.finish = run_loss


def rows_vary(same: bool, *tensors: Tensor | None) -> None:
    """Tell the compiler that another batch of the same training has another number of rows, unless it is the same."""
    if same:
        return
    for tensor in tensors:
        if tensor is not None:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)


def start_compiler_workers() -> None:
    """Start the processes that compile GPU code now: they are ready when the first code is."""
    # Only a head start: what is missing or fails here is met again, and told, where it is needed.
    with suppress(Exception):
        from torch._inductor.async_compile import maybe_warm_pool

        maybe_warm_pool()


def compiler_seconds() -> float:
    """Return the seconds that this process has spent in torch.compile so far."""
    # Not imported for the question: it takes seconds.
    utils = sys.modules.get("torch._dynamo.utils")
    return 0.0 if utils is None else float(utils.calculate_time_spent()["total_wall_time"])
