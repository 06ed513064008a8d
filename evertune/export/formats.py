"""The formats of an export: which there are, and how each is written."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from evertune.export.graph import traced
from evertune.export.kinds import input_names, kind
from evertune.export.manifest import Format, Quantize
from evertune.lightning_modules.adapters import merge_adapters
from evertune.lightning_modules.saving import read_manifest
from evertune.lightning_modules.text_matching import TextMatchingModule
from evertune.lightning_modules.transformer import TransformerModule

LIBRARIES: dict[Format, tuple[str, ...]] = {
    "safetensors": ("evertune", "torch", "transformers", "safetensors"),
    "torch_export": ("evertune", "torch", "transformers"),
    "onnx": ("evertune", "torch", "transformers", "onnx", "onnxscript", "onnxruntime"),
}
"""Packages that take part in writing each format."""

GGUF = (
    "GGUF is written by llama.cpp, and not by evertune: export with format='safetensors' to a folder OUT, and run "
    "`python convert_hf_to_gguf.py OUT/model --outfile model.gguf` in a checkout of llama.cpp"
)


def check_format(format: Format, quantize: Quantize | None) -> None:
    """Refuse formats and quantizations that do not exist, or not together.

    Raises:
        ValueError: If they do not; the message names those that do.
    """
    if str(format) == "gguf":
        raise ValueError(GGUF)
    if format not in get_args(Format):
        raise ValueError(f"format must be one of {', '.join(get_args(Format))}, got {format!r}")
    if quantize is not None and quantize not in get_args(Quantize):
        raise ValueError(f"quantize must be {', '.join(get_args(Quantize))} or None, got {quantize!r}")
    if quantize is not None and format != "onnx":
        raise ValueError(f"{format} is not quantized: quantize={quantize!r} goes with format='onnx'")


def loaded(folder: Path) -> TransformerModule:
    """The module saved in a folder, in evaluation mode.

    Raises:
        ValueError: If its class cannot be exported.
    """
    module = kind(read_manifest(folder).module).from_pretrained(folder)
    module.requires_grad_(False).eval()
    return module


def merged(folder: Path) -> TransformerModule:
    """The same with its adapters, if it has any, merged into the weights."""
    module = loaded(folder)
    if module.prompt is not None:
        raise ValueError(
            f"virtual tokens of {module.prompt.method} cannot be merged into the weights, so this version cannot be "
            "exported; `evertune serve` answers with it as it is"
        )
    if module.peft is not None:
        merge_adapters(module.backbone)
        module.peft = module.hparams["peft"] = None
        if isinstance(module, TextMatchingModule):
            module.index = None  # of weights under other names
    return module


def write(module: TransformerModule, folder: Path, format: Format, quantize: Quantize | None) -> None:
    """Write a module to a folder, with its tokenizer. In ONNX its attention becomes ``"eager"``."""
    if format == "safetensors":
        module.save_pretrained(folder)
        return
    folder.mkdir(parents=True)
    if format == "onnx":
        # ONNX Runtime has no kernel for the fused attention that torch exports: eager attention computes less there.
        module.backbone.set_attn_implementation("eager")
    program = traced(module)
    if format == "torch_export":
        from evertune.export.torch_program import write_program

        write_program(program, folder)
    else:
        from evertune.export.onnx_runtime import QUANTIZERS, write_onnx

        write_onnx(program, input_names(module), folder)
        if quantize is not None:
            QUANTIZERS[quantize](folder)
    module.backbone.config.save_pretrained(folder)
    module.tokenizer.save_pretrained(folder)


def weights_size(folder: Path) -> int:
    """Bytes of the files with weights in a folder."""
    suffixes = (".safetensors", ".pt2", ".onnx", ".data")
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in suffixes)
