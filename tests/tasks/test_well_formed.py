"""The most probable well-formed tags, against a search of all tags."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from evertune.metrics import check_tags
from evertune.tasks.well_formed import best_tags

TAGS = ["O", "B-ORG", "I-ORG", "B-LOC", "I-LOC"]


def well_formed(tags: tuple[str, ...]) -> bool:
    try:
        check_tags(list(tags))
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("seed", range(5))
def test_it_finds_what_a_search_of_all_well_formed_tags_finds(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    texts = [torch.randn(n, len(TAGS), generator=generator) for n in (4, 1, 0, 3)]
    found = best_tags(texts, TAGS)
    for logits, tags in zip(texts, found, strict=True):
        every = [one for one in product(TAGS, repeat=len(logits)) if well_formed(one)]
        score = [float(sum(row[TAGS.index(tag)] for row, tag in zip(logits, one, strict=True))) for one in every]
        assert tags == list(every[max(range(len(every)), key=score.__getitem__)])


def test_the_order_of_the_tags_does_not_matter_and_nothing_has_none() -> None:
    logits = torch.randn(6, len(TAGS), generator=torch.Generator().manual_seed(0))
    order = [3, 0, 4, 2, 1]
    assert best_tags([logits[:, order]], [TAGS[number] for number in order]) == best_tags([logits], TAGS)
    assert best_tags([], TAGS) == [] and best_tags([logits[:0]], TAGS) == [[]]
    assert best_tags([logits[:2, :1]], ["O"]) == [["O", "O"]]
