"""What requests and answers look like, as pydantic models: they check requests, and describe both in OpenAPI."""

from __future__ import annotations

from typing import Annotated, Any
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, TypeAdapter

from evertune.explain.explainer import Method
from evertune.explain.explanation import Said
from evertune.explain.neighbours import Neighbour
from evertune.explain.parts import Part

Id = Annotated[str, Field(min_length=1, max_length=200)]
_Part = Annotated[str, Field(min_length=1)]
_Label = Annotated[str, Field(min_length=1, max_length=1_000)]


class _Strict(BaseModel):
    # A misspelt field is an error, not a default; and a number is not a text.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Message(_Strict):
    """A turn of a conversation."""

    role: Annotated[str, Field(min_length=1, max_length=100)]
    content: _Part


class Record(_Strict):
    """A text to answer."""

    text: (
        _Part
        | Annotated[list[_Part], Field(min_length=2, max_length=2)]
        | Annotated[list[Message], Field(min_length=1, max_length=1_000)]
    ) = Field(
        description="A text; for a model of pairs, such as a question and its context, two texts; for a model "
        "of conversations also a list of messages."
    )
    id: Id = Field(
        default_factory=lambda: uuid4().hex,
        description="Names the record in the answer, in the log and in later feedback. Default: a random one.",
    )

    @property
    def input(self) -> Any:
        """The text, the pair of texts as a tuple, or the messages as dicts."""
        if isinstance(self.text, str):
            return self.text
        messages = [part.model_dump() for part in self.text if isinstance(part, Message)]
        return messages or tuple(self.text)

    @property
    def characters(self) -> int:
        """Length of the text, of both texts, or of all messages."""
        return length_of(self.input)


_Top = Annotated[int, Field(ge=1, description="Number of classes, most probable first, whose probability is given.")]


class One(Record):
    """A request with one record."""

    top: _Top = 5


class Many(_Strict):
    """A request with several records, which the same version answers."""

    records: Annotated[list[Record], Field(min_length=1)]
    top: _Top = 5


class Answer(BaseModel):
    """What the model says of a record."""

    id: str
    label: str | list[str] = Field(
        description="The most probable class; of a model with several labels per text, all above one half."
    )
    confidence: float = Field(description="Probability of the label, from 0 to 1; of several, of all of them at once.")
    probabilities: dict[str, float] = Field(description="The probabilities of the most probable classes.")
    version: int = Field(description="Number of the version that answered.")


class TaskAnswer(BaseModel):
    """What a model that does not classify answers: entities, a span, a text."""

    id: str
    prediction: Any = Field(description="What the model's task gives, such as a list of entities with their places.")
    version: int = Field(description="Number of the version that answered.")


class Answers(BaseModel):
    """The answers to several records, in their order."""

    answers: list[Answer] | list[TaskAnswer]


class Feedback(_Strict):
    """The right label of a record, once it is known."""

    id: Id = Field(description="The id of the record, as in its answer.")
    label: _Label | list[_Label] | dict[str, Any] | list[dict[str, Any]] = Field(
        description="The right label, or labels, as the task takes them. It may be a new class."
    )


class Feedbacks(_Strict):
    """The right labels of several records."""

    feedback: Annotated[list[Feedback], Field(min_length=1)]


class Explain(_Strict):
    """A text whose answer is to be explained."""

    text: _Part
    label: _Label | None = Field(default=None, description="The class to explain. Default: the answer.")
    method: Method = Field(default="occlusion", description="How the effect of each word is found.")
    neighbours: Annotated[int, Field(ge=0, le=50)] = Field(
        default=5, description="Number of nearest examples of the version's memory."
    )


class Explained(BaseModel):
    """Why the version in production gives a text a label, as `evertune explain` says it."""

    text: str
    version: int = Field(description="Number of the version that answered.")
    label: str = Field(description="The label that is explained.")
    method: str
    probabilities: dict[str, float] = Field(description="The probabilities of the most probable classes.")
    parts: list[Part] = Field(description="The words of the text, each with its effect.")
    neighbours: list[Neighbour] = Field(description="The nearest examples of the memory.")
    pulling: list[Neighbour] = Field(description="The examples of the memory that pull the label most, up or down.")
    history: list[Said]
    flips: list[list[int]]
    missing: list[str] = Field(description="What is not there, each with the reason, such as a version without memory.")


class Accepted(BaseModel):
    """How many labels were taken."""

    accepted: int
    ignored: int = Field(description="Labels of requests outside the share that is logged.")


class Problem(BaseModel):
    """One thing that is wrong with a request."""

    at: str = Field(description="Where: ``records.3.text``; empty for the whole body.")
    problem: str


class Error(BaseModel):
    """Why a request was not answered."""

    error: str
    problems: list[Problem] = []


def _one_or_many(field: str) -> Discriminator:
    def kind(body: Any) -> str:
        return "many" if isinstance(body, dict) and field in body else "one"

    return Discriminator(kind)


PREDICT: TypeAdapter[One | Many] = TypeAdapter(
    Annotated[Annotated[One, Tag("one")] | Annotated[Many, Tag("many")], _one_or_many("records")]
)
EXPLAIN: TypeAdapter[Explain] = TypeAdapter(Explain)
FEEDBACK: TypeAdapter[Feedback | Feedbacks] = TypeAdapter(
    Annotated[Annotated[Feedback, Tag("one")] | Annotated[Feedbacks, Tag("many")], _one_or_many("feedback")]
)


def length_of(text: Any) -> int:
    """Length in characters of what :attr:`Record.input` returns."""
    if isinstance(text, str):
        return len(text)
    return sum(len(part["content"]) if isinstance(part, dict) else len(part) for part in text)


def answer(record: Record, probabilities: dict[str, float], several: bool, version: int, top: int) -> Answer:
    """The answer to a record.

    Args:
        record: The record.
        probabilities: Probability of each class, most probable first, as ``module.predict`` gives them.
        several: Whether a text may have any number of labels.
        version: Number of the version that predicted.
        top: Number of classes whose probability is given.
    """
    label: str | list[str]
    if several:
        label, confidence = [], 1.0
        for name, probability in probabilities.items():
            if probability > 0.5:
                label.append(name)
            confidence *= max(probability, 1 - probability)
    else:
        label, confidence = next(iter(probabilities.items()))
    shown = dict(list(probabilities.items())[:top])
    # Not validated: the values are our own, and this is done for every answer.
    return Answer.model_construct(
        id=record.id, label=label, confidence=confidence, probabilities=shown, version=version
    )
