"""The most probable tags of texts among those that are well formed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def best_tags(logits: Sequence[Tensor], tags: Sequence[str]) -> list[list[str]]:
    """The most probable tags of each text in which an entity goes on only as what it began as.

    The most probable tag of each word alone would do for a model that is sure. One that wavers between two types, as
    after a few examples of each, cuts an entity into pieces of both, none of which is right. The search is Viterbi's
    (1967), with words independent of each other but for ``I-X``, which comes only after ``B-X`` or ``I-X``.

    Args:
        logits: Those of the words of each text, ``[words, tags]``.
        tags: The tag of each logit: ``O``, and ``B-X`` and ``I-X`` of each type ``X``.

    Example:
        >>> wavering = torch.tensor([[0.0, 3.0, 0.0, 1.0, 0.0], [0.0, 0.0, 2.0, 0.0, 3.0]])
        >>> best_tags([wavering], ["O", "B-ORG", "I-ORG", "B-LOC", "I-LOC"])  # one by one: B-ORG I-LOC
        [['B-ORG', 'I-ORG']]
    """
    lengths = torch.tensor([len(one) for one in logits])
    if not len(lengths) or not lengths.max():
        return [[] for _ in logits]
    scores = pad_sequence([one.float().cpu() for one in logits], batch_first=True)  # [texts, words, tags]
    inside = torch.tensor([number for number, tag in enumerate(tags) if tag.startswith("I-")], dtype=torch.int64)
    begin = torch.tensor([tags.index(f"B-{tags[number][2:]}") for number in inside.tolist()], dtype=torch.int64)
    best = scores[:, 0].clone()  # the score of the best tags up to a word, by the number of the last one
    best[:, inside] = -torch.inf
    before = []  # the number of the tag before
    for place in range(1, scores.shape[1]):
        value, number = (one.expand(best.shape).clone() for one in best.max(1, keepdim=True))
        begun = best[:, begin] > best[:, inside]
        number[:, inside] = torch.where(begun, begin, inside)
        value[:, inside] = torch.where(begun, best[:, begin], best[:, inside])
        there = (place < lengths).unsqueeze(1)
        before.append(torch.where(there, number, torch.arange(len(tags))))
        best = torch.where(there, value + scores[:, place], best)
    chosen = [best.argmax(1)]
    for number in reversed(before):
        chosen.append(number.gather(1, chosen[-1].unsqueeze(1)).squeeze(1))
    numbers = torch.stack(chosen[::-1], 1).tolist()
    return [[tags[number] for number in row[:length]] for row, length in zip(numbers, lengths.tolist(), strict=True)]
