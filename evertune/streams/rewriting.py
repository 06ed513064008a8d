"""Training records in other words: copies of the records of an experience whose texts were rewritten."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from evertune._lightning import isolate_rng, rank_zero_info
from evertune.streams.experience import Experience
from evertune.tasks.base import Task
from evertune.utils.examples import Examples
from evertune.utils.extras import library

_WORD = re.compile(r"[^\W\d_]+")
_SHORTEST = 4  # letters of a word that is replaced: shorter ones are rarely content
Rewriter = Callable[[Sequence[str], int], Sequence[str]]
"""Function ``(texts, seed) -> texts`` that says the same in other words; an empty text where it cannot."""


def augment(
    experience: Experience,
    rewrite: Rewriter,
    *,
    copies: int = 1,
    text: str | Sequence[str] = "text",
    task: Task | None = None,
    seed: int = 0,
) -> Experience:
    """An experience with copies of its training records in other words, after the records themselves.

    ``val`` and ``test`` stay as they are. A copy keeps all other fields of its record: its label, and its id, so that a
    replay memory with ``id=`` holds a record once, and erasing it by its id erases its copies. A copy that has lost
    its text, or repeats its record or another copy of it, is left out; how many are is logged.

    Args:
        experience: Experience whose ``train`` holds records as dicts.
        rewrite: Function ``(texts, seed) -> texts``, such as :class:`BackTranslation`, called for each copy and each
            field with a seed of its own.
        copies: Number of copies of each record. Default: 1.
        text: Field with the text, or several fields, each rewritten on its own: of a pair of texts, or the prompt of an
            instruction.
        task: Task of the module, to refuse records whose labels point into their texts, as those of entities and of
            answers do. Default: None, which refuses nothing.
        seed: Seed of ``rewrite``. Default: 0.

    Raises:
        ValueError: If ``copies`` is not positive, the task's labels would not fit the new texts, a record has no such
            field with a text in it, or ``rewrite`` returns another number of texts.

    Example:
        >>> rows = [{"text": "my card is lost", "label": "card"}, {"text": "hi", "label": "hello"}]
        >>> shout = lambda texts, seed: [text.replace("lost", "gone") for text in texts]
        >>> augment(Experience("one", rows), shout).train[1:]
        [{'text': 'hi', 'label': 'hello'}, {'text': 'my card is gone', 'label': 'card'}]
    """
    if copies < 1:
        raise ValueError(f"copies must be positive, got {copies}")
    if task is not None and "rewrite" not in task.tolerates:
        raise ValueError(
            f"the labels of {type(task).__name__} point into the texts, and would be wrong in other words: "
            "evertune.callbacks.Augmentation(deletion=0, swap=0, cutoff=0.1) may be possible"
        )
    records, fields = _records(experience), [text] if isinstance(text, str) else list(text)
    columns = [_texts(records, field) for field in fields]
    said = [{texts} for texts in zip(*columns, strict=True)]
    made: list[dict[str, Any]] = []
    for copy in range(copies):
        rewritten = [_rewritten(rewrite, column, seed, copy, n) for n, column in enumerate(columns)]
        for record, before, texts in zip(records, said, zip(*rewritten, strict=True), strict=True):
            if texts not in before and all(texts):
                before.add(texts)
                made.append({**record, **dict(zip(fields, texts, strict=True))})
    left_out = copies * len(records) - len(made)
    rank_zero_info(
        f"{experience.name}: {len(made)} copies in other words join {len(records)} training records; {left_out} were "
        "left out, which were empty or repeated others"
    )
    return replace(experience, train=_joined(experience.train, made))


class BackTranslation:
    """Texts translated into another language and back.

    Sennrich et al. 2016, "Improving Neural Machine Translation Models with Monolingual Data". By default translations
    are sampled among the ten most likely tokens (Edunov et al. 2018, "Understanding Back-Translation at Scale"), so
    that several copies of a text differ.

    Args:
        there: Module that translates texts: a :class:`~evertune.lightning_modules.Seq2SeqModule`, or another with
            ``predict(texts, batch_size=..., **generation) -> texts``.
        back: Module that translates them back.
        batch_size: Number of texts that are translated at a time. Default: 8.
        generation: Settings of transformers' ``generate`` for both. Default: ``{"do_sample": True, "top_k": 10}``.

    Example::

        there = Seq2SeqModule("Helsinki-NLP/opus-mt-en-de")
        back = Seq2SeqModule("Helsinki-NLP/opus-mt-de-en")
        larger = augment(experience, BackTranslation(there, back), copies=2, seed=0)
    """

    def __init__(self, there: Any, back: Any, batch_size: int = 8, generation: Mapping[str, Any] | None = None) -> None:
        for name, module in (("there", there), ("back", back)):
            if not callable(getattr(module, "predict", None)):
                raise TypeError(f"{name} must translate texts by a method predict, got a {type(module).__name__}")
        self.there, self.back, self.batch_size = there, back, batch_size
        self.generation = {"do_sample": True, "top_k": 10} if generation is None else dict(generation)

    def __call__(self, texts: Sequence[str], seed: int) -> list[str]:
        """The texts after both translations, the same for the same seed; empty where a translation is."""
        with isolate_rng():
            torch.manual_seed(seed)
            return self._translated(self.back, self._translated(self.there, texts))

    def _translated(self, module: Any, texts: Sequence[str]) -> list[str]:
        places = [place for place, text in enumerate(texts) if text.strip()]
        found = [""] * len(texts)
        if places:
            said = module.predict([texts[place] for place in places], batch_size=self.batch_size, **self.generation)
            for place, text in zip(places, said, strict=True):
                found[place] = text.strip()
        return found


class Synonyms:
    """Some words of each text replaced by a synonym, as WordNet has them (Miller 1995, "WordNet: A Lexical Database for
    English").

    After EDA (Wei & Zou 2019). Words of fewer than four letters are left alone, and so are those without a synonym.
    Needs NLTK and its data.

    Args:
        share: Share of the words that are replaced; at least one. Default: 0.1, as in the paper.

    Raises:
        ModuleNotFoundError: If NLTK is not installed.
        ValueError: If ``share`` is out of range, or NLTK has no WordNet.

    Example::

        larger = augment(experience, Synonyms(share=0.1), copies=2, seed=0)
    """

    def __init__(self, share: float = 0.1) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {share}")
        self.share = share
        self._wordnet = library("nltk.corpus", "synonyms").wordnet
        try:
            self._wordnet.ensure_loaded()
        except LookupError:
            raise ValueError("NLTK has no WordNet: run python -m nltk.downloader wordnet, once") from None

    def __call__(self, texts: Sequence[str], seed: int) -> list[str]:
        """The texts with other words, the same for the same seed and text."""
        return [self._replaced(text, np.random.default_rng([seed, *text.encode()])) for text in texts]

    def _replaced(self, text: str, generator: np.random.Generator) -> str:
        words = list(_WORD.finditer(text))
        known = [(word, others) for word in words if (others := self._synonyms(word[0]))]
        if not known:
            return text
        n = min(len(known), max(1, round(self.share * len(words))))
        chosen = sorted(generator.choice(len(known), n, replace=False).tolist(), reverse=True)
        for word, others in (known[place] for place in chosen):  # from the last, as places before it stay
            other = str(generator.choice(others))
            other = other.capitalize() if word[0][0].isupper() else other
            text = text[: word.start()] + other + text[word.end() :]
        return text

    def _synonyms(self, word: str) -> list[str]:
        """The other words of all its meanings, sorted."""
        if len(word) < _SHORTEST:
            return []
        names = {name.replace("_", " ") for synset in self._wordnet.synsets(word) for name in synset.lemma_names()}
        return sorted(name for name in names if name.lower() != word.lower())


def _records(experience: Experience) -> list[dict[str, Any]]:
    """The training records as dicts."""
    records = [experience.train[index] for index in range(len(experience.train))]
    for number, record in enumerate(records):
        if not isinstance(record, Mapping):
            raise ValueError(
                f"{experience.name}: training example {number} is a {type(record).__name__}; augment the records, "
                "dicts with a text, before they are tokenised"
            )
    return [dict(record) for record in records]


def _texts(records: Sequence[Mapping[str, Any]], field: str) -> list[str]:
    for number, record in enumerate(records):
        if not isinstance(record.get(field), str):
            raise ValueError(
                f"training record {number} has no text in its field {field!r}, got {record.get(field)!r:.80}"
            )
    return [record[field] for record in records]


def _rewritten(rewrite: Rewriter, texts: Sequence[str], seed: int, copy: int, field: int) -> list[str]:
    """The texts of a field in other words, by a seed that depends on the copy and the field."""
    own = int(np.random.SeedSequence([seed, copy, field]).generate_state(1)[0])
    found = list(rewrite(texts, own))
    if len(found) != len(texts):
        raise ValueError(f"rewrite must return a text for each text, got {len(found)} for {len(texts)}")
    return found


def _joined(train: Examples, copies: list[dict[str, Any]]) -> Examples:
    """The records and the copies, as a ``Dataset`` if the records are one."""
    if hasattr(train, "features") and copies:
        from datasets import Dataset, concatenate_datasets

        table: Any = train
        joined: Examples = concatenate_datasets([table, Dataset.from_list(copies, features=table.features)])
        return joined
    return [*(train[index] for index in range(len(train))), *copies]
