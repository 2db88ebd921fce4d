"""Several processes that train one network, as ``torchrun`` starts them.

Every process takes its part of each batch and each list of cases, and all of them keep the same weights. With one
process, which has no process group, every function here does nothing and costs nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from ukbob_seg.errors import ConfigError, UkbobError
from ukbob_seg.networks.diffusion import NoisePrediction

if TYPE_CHECKING:
    from ukbob_seg.training.augmentation import Batch, Transform

T = TypeVar("T")

# One process may validate for hours while others wait; torchrun ends all of them when one dies.
PATIENCE = timedelta(days=2)


@contextmanager
def process_group(processes: int) -> Iterator[None]:
    """Join the other processes of ``torchrun`` (its environment variables say how) while the block runs."""
    if processes == 1:
        yield
        return
    distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        yield
        distributed.barrier()  # the first process serves the store that the others still talk to
    finally:
        distributed.destroy_process_group()


def _joined() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def world_size() -> int:
    """Number of processes."""
    return distributed.get_world_size() if _joined() else 1


def rank() -> int:
    """This process's number, from 0."""
    return distributed.get_rank() if _joined() else 0


def is_first() -> bool:
    """Whether this process writes files and talks to the user."""
    return rank() == 0


def gather(value: T) -> list[T]:
    """What every process gave, in the order of ranks; plain Python objects."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values


def any_process(flag: bool) -> bool:
    """Whether any process says so. Cheap enough for every step."""
    if world_size() == 1:
        return flag
    flags = torch.tensor(int(flag))
    distributed.all_reduce(flags, distributed.ReduceOp.MAX)
    return bool(flags)


def together(function: Callable[[], T]) -> T:
    """Call a function in the first process and then in the others, which find the files that it wrote.

    Raises:
        UkbobError: in every process when one raised it; only the first process's has a message, so that the user
            reads it once.
    """
    if world_size() == 1:
        return function()
    results: list[T] = []
    for my_turn in (is_first(), not is_first()):
        error = None
        if my_turn:
            try:
                results.append(function())
            except UkbobError as raised:
                error = raised
        raised_anywhere = [raised for raised in gather(error) if raised is not None]
        if raised_anywhere:
            raise said_once(raised_anywhere[0])
    return results[0]


def said_once(error: UkbobError) -> UkbobError:
    """An error that all processes raise at the same place: with its message in the first one only."""
    return error if is_first() else type(error)("")


def check_batch(batch_size: int) -> None:
    """Refuse a number of processes that does not divide the batch.

    Raises:
        ConfigError: says which numbers do.
    """
    if batch_size % world_size():
        fitting = ", ".join(str(n) for n in range(1, batch_size + 1) if batch_size % n == 0)
        raise ConfigError(
            f"the plans' batch of {batch_size} patches cannot be divided among {world_size()} processes; start "
            f"{fitting} with torchrun, or plan with another --batch-size"
        )


class _SumOverRanks(torch.autograd.Function):
    """Sum of each tensor over all processes, in one exchange of float64.

    Every process computes the same loss from the sums, and its own part of the gradient. The parts must be added,
    but DistributedDataParallel averages: hence the factor in ``backward``.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        packed = torch.cat([tensor.detach().reshape(-1).double() for tensor in tensors])
        distributed.all_reduce(packed)
        parts = packed.split([tensor.numel() for tensor in tensors])
        sums = tuple(part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True))
        ctx.mark_non_differentiable(*(total for total in sums if not total.is_floating_point()))
        return sums

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return tuple(None if gradient is None else gradient * world_size() for gradient in gradients)


def sum_over_ranks(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Sums over all processes, through which gradients flow; the tensors themselves with one process.

    A loss that is a function of such sums is the loss of the whole batch, in every process. For networks wrapped by
    ``spread``.
    """
    return tensors if world_size() == 1 else _SumOverRanks.apply(*tensors)


class _DetachUnused(nn.Module):
    """Hides the coarsest of several outputs, which no loss uses, from the search for parameters without gradient."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> Any:
        outputs = self.network(*inputs)
        if isinstance(outputs, Tensor | NoisePrediction) or len(outputs) == 1:
            return outputs
        return [*outputs[:-1], outputs[-1].detach()]


def spread(network: nn.Module, device: str, all_used: bool) -> nn.Module:
    """The network to train with: itself, or one whose gradients are averaged over all processes.

    Args:
        network: on its device; afterwards all processes have the first one's weights.
        device: where it is.
        all_used: whether every parameter has a gradient in every step, which saves a search for those without.
    """
    if world_size() == 1:
        return network
    devices = [torch.device(device)] if device.startswith("cuda") else None
    return nn.parallel.DistributedDataParallel(
        _DetachUnused(network), device_ids=devices, find_unused_parameters=not all_used
    )


def exchange(network: nn.Module, now: bool) -> AbstractContextManager[Any]:
    """Around a forward and backward pass: whether its gradients are averaged, or kept for a later pass."""
    if now or not isinstance(network, nn.parallel.DistributedDataParallel):
        return nullcontext()
    return network.no_sync()


class PartOfBatch:
    """A transform of the whole batch, applied to the part that this process has.

    Parameters are drawn for the whole batch, so that each element gets the same ones however many processes there are.
    """

    def __init__(self, transform: Transform) -> None:
        self.transform = transform

    def sample(self, batch_size: int, generator: torch.Generator) -> Any:
        """Draw for all elements, keep this process's."""
        whole = batch_size * world_size()
        return take_part(self.transform.sample(whole, generator), whole)

    def apply(self, batch: Batch, record: Any) -> Batch:
        """Apply drawn parameters."""
        return self.transform.apply(batch, record)


def take_part(record: Any, batch_size: int) -> Any:
    """This process's elements of a record that holds one value per element; other values stay as they are."""
    each = batch_size // world_size()
    mine = slice(rank() * each, (rank() + 1) * each)
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        values = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
        return dataclasses.replace(record, **{name: take_part(value, batch_size) for name, value in values.items()})
    if isinstance(record, dict):
        return {name: take_part(value, batch_size) for name, value in record.items()}
    if isinstance(record, list | tuple) and record and all(dataclasses.is_dataclass(value) for value in record):
        return type(record)(take_part(value, batch_size) for value in record)  # one record per transform
    per_element = hasattr(record, "__len__") and getattr(record, "ndim", 1) > 0 and len(record) == batch_size
    return record[mine] if per_element and not isinstance(record, str) else record


def my_cases(cases: Sequence[T]) -> list[T]:
    """Every so-many-th case, so that each process has about as many."""
    return list(cases[rank() :: world_size()])


def same_everywhere(weights: Iterable[Tensor]) -> None:
    """Give all processes the first one's values, in place; running statistics of BatchNorm differ between them."""
    if world_size() > 1:
        for tensor in weights:
            distributed.broadcast(tensor.detach(), 0)
