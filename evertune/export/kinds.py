"""The modules that can be exported, and a module whose computation an export does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evertune.lightning_modules.analytic_classification import AnalyticClassificationModule
from evertune.lightning_modules.backbone import accepted_inputs
from evertune.lightning_modules.causal_lm import CausalLMModule
from evertune.lightning_modules.generation import GenerationModule
from evertune.lightning_modules.item_index import ItemIndex
from evertune.lightning_modules.ordinal_classification import OrdinalClassificationModule
from evertune.lightning_modules.question_answering import QuestionAnsweringModule
from evertune.lightning_modules.relation_extraction import RelationExtractionModule
from evertune.lightning_modules.seq2seq import Seq2SeqModule
from evertune.lightning_modules.sequence_classification import SequenceClassificationModule
from evertune.lightning_modules.sequence_regression import SequenceRegressionModule
from evertune.lightning_modules.text_matching import TextMatchingModule
from evertune.lightning_modules.token_classification import TokenClassificationModule
from evertune.lightning_modules.transformer import TransformerModule
from evertune.utils.heads import HEAD_SIZE

Runner = Callable[[Mapping[str, np.ndarray]], np.ndarray]
"""Computes logits ``[batch, ...]`` from int64 arrays ``[batch, tokens]`` by the name of the input."""

_KINDS: dict[str, type[TransformerModule]] = {
    cls.__name__: cls
    for cls in (
        SequenceClassificationModule,
        AnalyticClassificationModule,
        OrdinalClassificationModule,
        SequenceRegressionModule,
        TokenClassificationModule,
        RelationExtractionModule,
        QuestionAnsweringModule,
        TextMatchingModule,
        CausalLMModule,
        Seq2SeqModule,
    )
}
"""Modules that can be exported. Looked up by name, and never imported by one: a file must not be able to run code."""

_MORE_INPUTS = {"QuestionAnsweringModule": ["char_end"]}  # which tokens are of the context


def kind(name: str) -> type[TransformerModule]:
    """The class of a module by its name.

    Raises:
        ValueError: If it cannot be exported.
    """
    if name not in _KINDS:
        raise ValueError(f"{name} cannot be exported: it must be one of {', '.join(_KINDS)}")
    return _KINDS[name]


def check_graph(module: TransformerModule) -> None:
    """Make sure that the answers of a module come from one pass over the tokens, which is what a graph computes.

    Raises:
        ValueError: If it generates texts.
    """
    if isinstance(module, GenerationModule):
        raise ValueError(
            f"{type(module).__name__} generates texts, token after token: export it with format='safetensors', which "
            "transformers and servers of language models read"
        )


def check_readable(module: TransformerModule) -> None:
    """Make sure that transformers alone reads what ``save_pretrained`` writes of a module.

    Raises:
        ValueError: If heads were removed from a transformer whose configuration has no place for that.
    """
    config = module.backbone.config
    if hasattr(config, HEAD_SIZE):
        raise ValueError(
            f"format='safetensors' is for other programs, and none of them knows a {config.model_type} from which "
            "attention heads were removed: export it with format='onnx' or 'torch_export'; evertune itself reads the "
            "version in the registry"
        )


def input_names(module: TransformerModule) -> list[str]:
    """The names of a module's inputs: what its tokenizer gives and its transformer takes, and what its head reads."""
    accepted = accepted_inputs(module.backbone) | {"attention_mask"}  # which the pooling needs in any case
    of_tokenizer = [name for name in module.tokenizer.model_input_names if name in accepted]
    return of_tokenizer + _MORE_INPUTS.get(type(module).__name__, [])


@dataclass(frozen=True)
class ExportedOutput:
    """What an export computes for a batch.

    Args:
        logits: As those of the module, ``[batch, ...]``.
    """

    logits: Tensor


def answering(name: str, settings: Mapping[str, Any], folder: Path, inputs: list[str], run: Runner) -> Any:
    """A module without weights, whose logits an export computes: it reads inputs and gives answers as it always does.

    Args:
        name: Name of the module's class.
        settings: Arguments of its constructor.
        folder: Folder with the configuration and the tokenizer of the transformer.
        inputs: Names of the inputs of the export, in their order.
        run: Computes the logits.
    """
    module: TransformerModule = kind(name)(**{**settings, "model_name_or_path": str(folder)})

    def forward(**batch: Tensor) -> ExportedOutput:
        return ExportedOutput(torch.from_numpy(run({name: batch[name].numpy() for name in inputs})))

    # Attributes of the instance, so that everything that asks for logits gets those of the export.
    module.forward = forward  # type: ignore[method-assign]
    module.configure_model = lambda: None  # type: ignore[method-assign]
    index = ItemIndex.load(folder)
    if index is not None and isinstance(module, TextMatchingModule):
        module.set_items(index.items)
        module.index = index
    return module.eval()
