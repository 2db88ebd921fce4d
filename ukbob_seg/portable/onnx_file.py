"""Networks as ONNX files, compared with the network itself in onnxruntime."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn

from ukbob_seg.errors import ConfigError
from ukbob_seg.networks.diffusion import DiffusionNetwork
from ukbob_seg.networks.wrappers import unwrapped

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
INPUT, OUTPUT = "image", "logits"
MOST_BYTES = 2**31 - 2**20  # a file is one message of protobuf, which ends there
LARGEST_DIFFERENCE = 1e-3  # of outputs, relative to the largest: beyond rounding
TALKATIVE = ("torch.onnx", "onnxscript", "onnx_ir")


def require_onnx() -> None:
    """Refuse early where a package is missing.

    Raises:
        ConfigError: names the pip command.
    """
    for name in PACKAGES:
        try:
            import_module(name)
        except ImportError as error:
            raise ConfigError(f"--onnx needs the package {name}: pip install 'ukbob_seg[onnx]' ({error})") from error


def onnx_bytes(network: nn.Module, image: Tensor, name: str) -> tuple[bytes, dict[str, float | int]]:
    """A network as the content of an ONNX file for inputs of one shape, and how far its outputs are from the network's.

    Args:
        network: in evaluation mode, on the CPU.
        image: (1, C, z, y, x) float32, a window as the network sees it.
        name: of the network, for messages.

    Returns:
        content; ``opset``, ``max_abs_difference`` of the outputs, and ``max_abs_output``.

    Raises:
        ConfigError: the network uses what ONNX has no operator for, is too large, or the file computes something else.
    """
    if isinstance(unwrapped(network), DiffusionNetwork):
        raise ConfigError(f"--onnx: {name} draws its segmentations by a sampler, which ONNX has not; leave it out")
    weights = sum(value.numel() * value.element_size() for value in network.state_dict().values())
    if weights > MOST_BYTES:
        raise ConfigError(f"--onnx: {name} has {weights:,} bytes of weights, an ONNX file at most 2 GiB; leave it out")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "network.onnx"
        try:
            with _quiet(), torch.no_grad():
                program = torch.onnx.export(
                    network, (image,), dynamo=True, input_names=[INPUT], output_names=[OUTPUT], verbose=False,
                    external_data=False,
                )  # fmt: skip
                assert program is not None
                program.save(file, external_data=False)
        except Exception as error:  # the exporter raises anything at what it does not know
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise ConfigError(f"--onnx: {name} cannot be exported to ONNX ({lines[0]}); leave --onnx out") from error
        content = _without_origin(file.read_bytes())
    return content, _compare(network, image, content, name)


def _without_origin(content: bytes) -> bytes:
    """The file without the exporter's notes on every operator: lines of source code, and their files on this disk."""
    model = import_module("onnx").load_from_string(content)
    graph = model.graph
    parts = (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer)
    for part in (*parts, *model.functions, *(node for function in model.functions for node in function.node)):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    stripped: bytes = model.SerializeToString(deterministic=True)
    return stripped


def _compare(network: nn.Module, image: Tensor, content: bytes, name: str) -> dict[str, float | int]:
    """Run the file in onnxruntime on a CPU, and the network."""
    onnx, runtime = import_module("onnx"), import_module("onnxruntime")
    try:
        session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(None, {INPUT: image.numpy()})[0])
    except Exception as error:  # a class of its own per kind of error, without a common parent
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(f"--onnx: onnxruntime does not run {name} ({lines[0]}); leave --onnx out") from error
    with torch.no_grad():
        expected = network(image)
    difference, largest = float((found - expected).abs().max()), float(expected.abs().max())
    if not difference <= LARGEST_DIFFERENCE * largest:
        raise ConfigError(
            f"--onnx: the ONNX file of {name} gives other outputs (difference {difference:.1e} of at most "
            f"{largest:.1e}); leave --onnx out"
        )
    opset = onnx.load_from_string(content).opset_import[0].version
    return {"opset": int(opset), "max_abs_difference": difference, "max_abs_output": largest}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's talk: of packages that are not there and of operators that it does not fold."""
    loggers = [logging.getLogger(name) for name in TALKATIVE]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
