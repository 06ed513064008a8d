"""The table of tasks: a row says how a tiny module of a task is made, what its records are, and which are refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from evertune.lightning_modules import (
    CausalLMModule,
    OrdinalClassificationModule,
    QuestionAnsweringModule,
    RelationExtractionModule,
    Seq2SeqModule,
    SequenceClassificationModule,
    SequenceRegressionModule,
    TextMatchingModule,
    TokenClassificationModule,
)
from evertune.sources.schema import RecordSchema
from tests.helpers.generation import dialogue, records, tiny_llama, tiny_t5
from tests.helpers.lightning_modules import TEXTS, tiny_bert

Record = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class TaskRow:
    """One task. `tests/tasks/test_tasks.py` runs every row through memory, importance, scores, records and folders.

    Args:
        module: Makes the module from the folder of a pretrained transformer. Dropout, if any, must not matter: scores
            are taken in evaluation mode.
        records: Eight or more records as they arrive. The first half and the second half are two experiences.
        refused: Records that the schema refuses, each with a part of the message.
        schema: Arguments of `RecordSchema`: the names and types of the fields.
        pretrained: Writes the pretrained transformer to a folder. Default: a tiny BERT.
        served: Whether the texts of a record are all that a prediction needs. Default: True.
        exported: The formats to which the module can be exported. Default: all.
    """

    module: Callable[[str], Any]
    records: Sequence[Record]
    refused: Sequence[tuple[Record, str]]
    schema: Mapping[str, Any] = field(default_factory=dict)
    pretrained: Callable[[str], Any] = tiny_bert
    served: bool = True
    exported: Sequence[str] = ("safetensors", "torch_export", "onnx")

    def schema_for(self, module: Any) -> RecordSchema:
        """The schema of the records, with the checks of the module's task."""
        return RecordSchema(**self.schema).for_task(module.task)


def asked(context: str, answer: str | None) -> dict[str, Any]:
    """A question about a context, which names the kind of the answer; None if there is no answer."""
    answers = [] if answer is None else [{"text": answer, "answer_start": context.index(answer)}]
    return {"question": "a law of the party", "context": context, "answers": answers}


TAGS = {"bank": "B-ORG", "market": "B-ORG", "team": "B-TEAM", "match": "B-EVENT"}


def related(text: str, name: str) -> dict[str, Any]:
    """A relation between the first and the last word."""
    words = text.split()
    return {"tokens": words, "head": [0, 1], "tail": [len(words) - 1, len(words)], "relation": name}


SENTENCES = [(text, name) for name in ("business", "sport") for text in TEXTS[name]] * 2

ASKED = [*records("colours"), *records("sizes")]


ITEMS = [text for texts in TEXTS.values() for text in texts]


def asked_for(text: str, *negatives: str) -> dict[str, Any]:
    """A query, its last word, and the text that it is from."""
    return {"query": text.rsplit(maxsplit=1)[-1], "positive": text, "negatives": list(negatives)}


def with_items(folder: str, **settings: Any) -> TextMatchingModule:
    """A module that ranks all texts."""
    module = TextMatchingModule(folder, n_negatives=4, dropout=0.0, **settings)
    module.set_items(ITEMS)
    return module


def entity(start: int, end: int) -> dict[str, Any]:
    return {"start": start, "end": end, "label": "ORG"}


ROWS: dict[str, TaskRow] = {
    "sequence classification": TaskRow(
        module=SequenceClassificationModule,
        records=[{"text": text, "label": name} for text, name in SENTENCES],
        refused=[
            ({"text": "the bank", "label": ["sport"]}, "one label is expected, got the list ['sport']"),
            ({"text": " ", "label": "sport"}, "field 'text': the text is empty"),
            ({"text": ["the", "bank"], "label": "sport"}, "field 'text' must be a text, not a list"),
        ],
    ),
    "several labels": TaskRow(
        module=lambda folder: SequenceClassificationModule(folder, multi_label=True),
        records=[{"text": text, "label": [name, "news"][: 1 + len(text) % 2]} for text, name in SENTENCES],
        refused=[({"text": "the bank", "label": "sport"}, "multi_label=True expects a list of names, got 'sport'")],
    ),
    "pairs of texts": TaskRow(
        module=SequenceClassificationModule,
        schema={"text": ["first", "second"]},
        records=[{"first": text, "second": "the law of a goal", "label": name} for text, name in SENTENCES],
        refused=[
            ({"first": "the bank", "second": "", "label": "sport"}, "field 'second': the text is empty"),
            ({"first": "the bank", "label": "sport"}, "field 'second' is missing"),
        ],
    ),
    "an order of classes": TaskRow(
        module=lambda folder: OrdinalClassificationModule(folder, classes=["1", "2", "3"]),
        records=[{"text": text, "label": 1 + len(text) % 3} for text, _ in SENTENCES],
        refused=[
            ({"text": "the bank", "label": 4}, "the label '4' is none of the classes ['1', '2', '3'], whose order is"),
            ({"text": "the bank", "label": ["1"]}, "one label is expected, got the list ['1']"),
        ],
    ),
    "a number": TaskRow(
        module=lambda folder: SequenceRegressionModule(folder, mean=12.0, scale=7.0),
        schema={"fields": {"text": "str", "label": "float"}},
        records=[{"text": text, "label": len(text)} for text, _ in SENTENCES],
        refused=[
            ({"text": "the bank", "label": "good"}, "field 'label': the label 'good' is not a number"),
            ({"text": "the bank", "label": float("nan")}, "field 'label': no label, or a number that is not finite"),
            ({"text": "the bank", "label": float("inf")}, "field 'label': no label, or a number that is not finite"),
            ({"text": "the bank", "label": None}, "field 'label'"),
        ],
    ),
    "several numbers": TaskRow(
        module=lambda folder: SequenceRegressionModule(folder, n_targets=2, scale=[10.0, 2.0]),
        schema={"text": ["text", "other"], "fields": {"text": "str", "other": "str", "label": "list[float]"}},
        records=[{"text": text, "other": "a goal", "label": [len(text), 1.5]} for text, _ in SENTENCES],
        refused=[
            ({"text": "the bank", "other": "a goal", "label": [1.0]}, "a list of 2 numbers is expected, got [1.0]"),
            ({"text": "the bank", "other": "a goal", "label": [1.0, float("nan")]}, "field 'label"),
        ],
    ),
    "question answering": TaskRow(
        module=lambda folder: QuestionAnsweringModule(folder, stride=4),
        schema={"text": ["question", "context"], "label": "answers"},
        records=[
            asked(text, None if number % 3 == 0 else text.split()[-1]) for number, (text, _) in enumerate(SENTENCES)
        ],
        refused=[
            (asked("the bank", None) | {"question": " "}, "field 'question': the text is empty"),
            (asked("the bank", None) | {"context": ""}, "field 'context': the text is empty"),
            (asked("the bank", None) | {"answers": "bank"}, "field 'answers': the answers must be"),
            (
                asked("the bank", None) | {"answers": [{"text": "bank", "answer_start": 3}]},
                "the answer 'bank' is not in its context, which has ' ban' at answer_start=3; it is at 4",
            ),
        ],
    ),
    "answers to prompts": TaskRow(
        module=CausalLMModule,
        records=ASKED,
        schema={"text": "prompt", "label": "answer"},
        pretrained=tiny_llama,
        refused=[
            ({"prompt": "what", "answer": " "}, "field 'answer': there is no answer to learn: the text is empty"),
            ({"prompt": "what", "answer": ["big"]}, "there is no answer to learn: the text is a list"),
        ],
        exported=("safetensors",),
    ),
    "dialogues": TaskRow(
        module=lambda folder: CausalLMModule(folder, packing=True, score="exact_match"),
        records=[{"messages": dialogue(one["prompt"], one["answer"])} for one in ASKED],
        schema={"fields": {"messages": "list[dict]"}, "text": "messages", "label": None},
        pretrained=tiny_llama,
        refused=[
            ({"messages": dialogue("what")}, "field 'messages': the conversation has no turn of the assistant"),
            ({"messages": dialogue("what", "")}, "message 2, a turn of the assistant, is empty"),
            ({"messages": []}, "a conversation is a list of messages"),
            ({"messages": ["what", "big"]}, "message 1 is a str, not a mapping with role and content"),
        ],
        exported=("safetensors",),
    ),
    "plain texts": TaskRow(
        module=CausalLMModule,
        records=[{"text": f"{one['prompt']} {one['answer']}"} for one in ASKED],
        schema={"label": None},
        pretrained=tiny_llama,
        refused=[({"text": " "}, "field 'text': the text is empty")],
        exported=("safetensors",),
    ),
    "sequence to sequence": TaskRow(
        module=lambda folder: Seq2SeqModule(folder, generation={"max_new_tokens": 3}),
        records=ASKED,
        schema={"text": "prompt", "label": "answer"},
        pretrained=tiny_t5,
        refused=[({"prompt": "what", "answer": ""}, "field 'answer': there is no answer to learn: the text is empty")],
        exported=("safetensors",),
    ),
    "tags of words": TaskRow(
        module=TokenClassificationModule,
        records=[
            {"words": text.split(), "tags": [TAGS.get(word, "O") for word in text.split()]} for text, _ in SENTENCES
        ],
        refused=[
            ({"words": ["the", "bank"], "tags": ["O"]}, "there must be a tag for each word, got 1 for 2 words"),
            ({"words": ["the", "bank"], "tags": ["O", "I-ORG"]}, "word 2 has the tag 'I-ORG', which continues no ORG"),
            ({"words": ["the", "bank"], "tags": ["O", "S-ORG"]}, "word 2 has the tag 'S-ORG', which is not of IOB2"),
            ({"words": ["the", "market share"], "tags": ["O", "O"]}, "word 2 of 2 must be a text without spaces"),
            ({"words": [], "tags": []}, "field 'words': there are no words"),
            ({"words": ["the"], "tags": "O"}, "a list of tags or of entities is expected, got 'O'"),
            ({"words": ["the"], "tags": None}, "a list of tags or of entities is expected, no label"),
        ],
        schema={"text": "words", "label": "tags", "fields": {"words": "list[str]", "tags": "list[str]"}},
    ),
    "entities of texts": TaskRow(
        module=lambda folder: TokenClassificationModule(folder, scheme="BIOES", dropout=0.0),
        records=[
            {
                "text": f"{text}, {text}",
                "label": [
                    {"start": match.start(), "end": match.end(), "label": TAGS[match.group()][2:]}
                    for match in re.finditer("|".join(TAGS), f"{text}, {text}")
                ],
            }
            for text, _ in SENTENCES
        ],
        refused=[
            ({"text": "the bank", "label": [entity(5, 8)]}, "the entity ORG at 5-8, 'ank', does not begin with a word"),
            (
                {"text": "the bank", "label": [entity(3, 8)]},
                "the entity ORG at 3-8, ' bank', does not begin with a wor",
            ),
            ({"text": "the bank", "label": [entity(4, 7)]}, "the entity ORG at 4-7, 'ban', does not end with a word"),
            ({"text": "the bank", "label": [entity(4, 9)]}, "ends after the text of 8 characters"),
            ({"text": "the bank", "label": [entity(8, 4)]}, "an entity must begin before it ends, got start=8, end=4"),
            ({"text": "the bank", "label": [entity(0, 8), entity(4, 8)]}, "ORG at 0-8 and ORG at 4-8 overlap"),
            ({"text": "the bank", "label": [{"start": 4}]}, 'an entity must be {"start": ..., "end": ..., "label":'),
            ({"text": "the bank", "label": ["O", "B-ORG"]}, "word 2 has the tag 'B-ORG', but the sentence ends"),
        ],
    ),
    "relation extraction": TaskRow(
        module=lambda folder: RelationExtractionModule(folder, unit="words"),
        schema={
            "text": "tokens",
            "label": "relation",
            "fields": {"tokens": "list[str]", "head": "list[int]", "tail": "list[int]", "relation": "str"},
        },
        records=[related(text, name) for text, name in SENTENCES],
        refused=[
            (related("the bank", "sport") | {"head": [0, 3]}, "head=[0, 3] is not in the text, which has 2 words"),
            (related("the bank", "sport") | {"tail": [1, 1]}, "tail=[1, 1] is not in the text"),
            (related("the bank", "sport") | {"tail": [1]}, "field 'tail': a span must be [start, end]"),
            (related("the [E1] bank", "sport"), "the text holds '[E1]', which marks entities"),
            (related("the bank", "sport") | {"tokens": ["the bank", "a"]}, "a word must be a text without spaces"),
        ],
        served=False,
    ),
    "text matching": TaskRow(
        module=lambda folder: with_items(folder, negatives="negatives"),
        schema={
            "text": "query",
            "label": "positive",
            "fields": {"query": "str", "positive": "str", "negatives": "list[str] | None"},
        },
        records=[asked_for(text, *ITEMS[6 : 6 + number % 4]) for number, (text, _) in enumerate(SENTENCES)],
        refused=[
            (asked_for("the bank") | {"query": " "}, "field 'query': the text is empty"),
            (asked_for("the bank") | {"positive": ""}, "field 'positive': the text is empty"),
            (asked_for("the bank") | {"positive": ["the", "bank"]}, "the text is a list, not a string"),
            (asked_for("the bank", "a law", " "), "field 'negatives': negative 2 of 2: the text is empty"),
            (asked_for("the bank", "a law", "the bank"), "the positive 'the bank' is among the negatives"),
        ],
    ),
    "recommendation": TaskRow(
        module=lambda folder: with_items(folder, architecture="cross_encoder"),
        schema={"text": "history", "label": "clicked", "fields": {"history": "list[str]", "clicked": "str"}},
        records=[{"history": text.split(), "clicked": text} for text, _ in SENTENCES],
        refused=[
            ({"history": [], "clicked": "a law"}, "field 'history': the history is empty: leave out users who have"),
            ({"history": ["a law", ""], "clicked": "a law"}, "field 'history': item 2 of 2: the text is empty"),
            ({"history": ["a law"], "clicked": " "}, "field 'clicked': the text is empty"),
        ],
    ),
}
