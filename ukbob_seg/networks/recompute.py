"""Maps that are cheaper to compute twice than to keep until the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ukbob_seg.networks.convolution import same_layers_again


def recomputed(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``function(*inputs)``, of which only the inputs are kept for the backward pass.

    What lies between is computed again there, up to the last value that a gradient needs: a convolution or linear layer
    at the end of the function is not repeated, because its gradient needs its input only. So what stands before the end
    should be cheap. CUDA keeps everything: nothing of this was measured there.

    Args:
        function: without random draws and side effects.
        inputs: tensors of any shape.
    """
    if not torch.is_grad_enabled() or inputs[0].is_cuda:
        return function(*inputs)
    again = same_layers_again()
    contexts: dict[str, Any] = {} if again is None else {"context_fn": lambda: (nullcontext(), again())}
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, **contexts)
