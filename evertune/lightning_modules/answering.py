"""A module's answers to texts, outside of a trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from evertune.lightning_modules.saving import gathered
from evertune.lightning_modules.transformer import TransformerModule
from evertune.tasks.texts import checked_texts, longest_text, padded_tokens, truncation_length
from evertune.utils.evaluation import evaluation_mode


def answers_to(module: TransformerModule, texts: Sequence[Any], batch_size: int, max_length: int | None) -> list[Any]:
    """What ``module.predict_step`` gives for texts or pairs of texts, one answer for each.

    Loads the weights if necessary. After a ZeRO-3 fit, call it on every rank.

    Raises:
        TypeError: If ``texts`` is a single string, or one of them is not a text or a pair of texts.
        ValueError: If ``max_length`` is more than the model takes, or a text has no tokens, or holds half of a
            surrogate pair.
    """
    checked = checked_texts(texts)
    module.configure_model()
    length = truncation_length(max_length or longest_text(module.tokenizer), module.tokenizer, module)
    answers: list[Any] = []
    with evaluation_mode(module), gathered(module), torch.inference_mode():
        for start in range(0, len(checked), batch_size):
            batch = padded_tokens(module.tokenizer, checked[start : start + batch_size], length, first=start)
            answers += module.predict_step(batch.to(module.device), start)
    return answers
