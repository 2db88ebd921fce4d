"""The order in which batches are copied and used; the CUDA side stream itself is tested in test_gpu.py."""

import contextlib

import pytest
import torch

from ukbob_seg.training.prefetch import SideStream, one_ahead, to_device


class _Copier:
    def __init__(self, log):
        self.log = log

    def begin(self, arrays):
        self.log.append(f"begin {int(arrays['image'])}")
        return {name: array.clone() for name, array in arrays.items()}

    def finish(self, arrays):
        self.log.append(f"finish {int(arrays['image'])}")
        return arrays


@pytest.mark.parametrize("number", [0, 1, 4])
def test_the_next_copy_begins_before_a_batch_is_used(number):
    log = []
    loader = ({"image": torch.tensor(n)} for n in range(number))
    for arrays in one_ahead(loader, _Copier(log)):
        log.append(f"use {int(arrays['image'])}")
    assert [line for line in log if line.startswith("use")] == [f"use {n}" for n in range(number)]
    for n in range(number):
        assert log.index(f"begin {n}") < log.index(f"finish {n}") < log.index(f"use {n}")
        if n + 1 < number:
            assert log.index(f"begin {n + 1}") < log.index(f"use {n}")
        if n + 2 < number:  # one ahead, not more: memory on the device is that of two batches
            assert log.index(f"use {n}") < log.index(f"begin {n + 2}")


class _Stream:
    """Stands for a CUDA stream: notes what is queued, and up to where another one waits."""

    def __init__(self):
        self.queue, self.waits_for = [], []

    def record_event(self):
        return tuple(self.queue)

    def wait_event(self, event):
        self.waits_for.append(event)

    def wait_stream(self, stream):
        self.waits_for.append(tuple(stream.queue))


class _Array(torch.Tensor):
    """A tensor whose copy to the device is noted on the side stream."""

    def to(self, device, non_blocking):
        assert non_blocking
        SIDE.queue.append(int(self))
        return self

    def record_stream(self, stream):
        assert stream is CURRENT


SIDE, CURRENT = _Stream(), _Stream()


def test_a_step_waits_for_its_own_batch_only(monkeypatch):
    """When a batch is taken the next one's copy is queued already; to wait for that too would undo the overlap."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SIDE)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: CURRENT)
    loader = [{"image": torch.tensor(n).as_subclass(_Array)} for n in range(3)]
    for number, arrays in enumerate(one_ahead(loader, SideStream("cuda"))):
        assert int(arrays["image"]) == number
        assert SIDE.queue == list(range(min(number + 2, 3)))
        assert CURRENT.waits_for[-1] == tuple(range(number + 1))


def test_batches_belong_to_the_training(tmp_path):
    loader = [{"image": torch.full((1, 1, 2, 2, 2), float(n)), "labels": torch.zeros(1, 2, 2, 2)} for n in range(3)]
    batches = list(to_device(loader, "cpu"))
    assert [float(batch.image.mean()) for batch in batches] == [0.0, 1.0, 2.0]
    assert all(batch.owned and batch.previous is None for batch in batches)
    loader[0]["previous"] = torch.ones(1, 2, 2, 2)
    assert next(to_device(loader[:1], "cpu")).previous is not None
