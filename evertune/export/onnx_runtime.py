"""ONNX: written by torch, quantized and run by ONNX Runtime on the CPU."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evertune.export.manifest import Quantize
from evertune.utils.extras import library

FILE = "model.onnx"
_SLOWER = ["SkipLayerNormFusion"]
"""Optimizations that ONNX Runtime leaves out: on a CPU, its fused sum and norm take three times as long as the two."""
_BLOCK = 32  # 4-bit weights with a scale of their own
_LARGE = 1 << 30  # bytes of weights above which they get a file of their own: protobuf ends at 2 GiB


def write_onnx(program: torch.export.ExportedProgram, names: Sequence[str], folder: Path) -> None:
    """Write a program as ``model.onnx`` (and ``model.onnx.data`` if it is large).

    Raises:
        ModuleNotFoundError: If the extra ``export`` is not installed.
    """
    library("onnxscript", "export")
    size = sum(weight.numel() * weight.element_size() for weight in program.state_dict.values())
    with _quiet("torch.onnx", logging.ERROR):
        written: Any = torch.onnx.export(
            program, (), input_names=list(names), output_names=["logits"], dynamo=True, verbose=False
        )
        written.save(folder / FILE, external_data=size > _LARGE)


def quantize_to_int8(folder: Path) -> None:
    """Replace ``model.onnx`` by one with 8-bit weights whose matrix products are of 8-bit integers.

    Weights are scaled per output channel, activations when they are computed (dynamically), so that no data are needed.
    Weights use 7 of the 8 bits: with 8, processors without VNNI saturate, and the same export would answer differently
    on another machine.

    Raises:
        ModuleNotFoundError: If the extra ``export`` is not installed.
    """
    quantization = library("onnxruntime.quantization", "export")
    with _replaced(folder) as (draft, large), _quiet("root", logging.ERROR):  # it advises a step that is done already
        quantization.quantize_dynamic(
            folder / FILE,
            draft,
            per_channel=True,
            reduce_range=True,
            weight_type=quantization.QuantType.QInt8,
            use_external_data_format=large,
        )


def quantize_to_int4(folder: Path) -> None:
    """Replace ``model.onnx`` by one with 4-bit weights, embeddings included; what is computed stays fp32.

    Each block of 32 weights has a scale and an offset, so that no data are needed. Larger blocks save little more, and
    without offsets twice as many answers change.

    Raises:
        ModuleNotFoundError: If the extra ``export`` is not installed.
    """
    quantization = library("onnxruntime.quantization.matmul_nbits_quantizer", "export")
    with _replaced(folder) as (draft, large), _quiet(quantization.__name__, logging.ERROR):
        # It warns that the graph is now of opset 21, and might not be valid: the check of the export shows that it is.
        model = library("onnx", "export").load(folder / FILE)
        quantizer = quantization.MatMulNBitsQuantizer(
            model, bits=4, block_size=_BLOCK, op_types_to_quantize=("MatMul", "Gather")
        )
        quantizer.process()
        quantizer.model.save_model_to_file(str(draft), large)


QUANTIZERS: dict[Quantize, Callable[[Path], None]] = {"int8": quantize_to_int8, "int4": quantize_to_int4}


@contextmanager
def _replaced(folder: Path) -> Iterator[tuple[Path, bool]]:
    """The file that will replace ``model.onnx``, and whether the weights have a file of their own."""
    draft, weights = folder / f"quantized-{FILE}", folder / f"{FILE}.data"
    yield draft, weights.is_file()
    weights.unlink(missing_ok=True)
    draft.replace(folder / FILE)


class OnnxRunner:
    """Runs ``model.onnx`` on the CPU, with as many threads as torch has.

    Args:
        folder: Folder of the file.

    Raises:
        ModuleNotFoundError: If the extra ``export`` is not installed.
        ValueError: If ONNX Runtime cannot load the file.
    """

    def __init__(self, folder: Path) -> None:
        runtime = library("onnxruntime", "export")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self._session = runtime.InferenceSession(
                folder / FILE, options, providers=["CPUExecutionProvider"], disabled_optimizers=_SLOWER
            )
        except Exception as error:
            raise ValueError(f"ONNX Runtime {runtime.__version__} cannot load {folder / FILE}: {error}") from error

    def __call__(self, tokens: Mapping[str, np.ndarray]) -> np.ndarray:
        """The logits ``[batch, classes]`` of tokens ``[batch, tokens]`` by the name of the input."""
        logits: np.ndarray = self._session.run(["logits"], dict(tokens))[0]
        return logits


@contextmanager
def _quiet(name: str, level: int) -> Iterator[None]:
    """Silence a logger below a level."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
