"""From records to the text that a language model reads, and the parts of it that it learns to write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from evertune.sources.conversations import ASSISTANT, Message


class Prompted(NamedTuple):
    """A text for a language model.

    Args:
        text: The whole text, with the special tokens that a chat template writes.
        answers: Start and end, in characters, of each part that is learned.
        templated: Whether the tokenizer must not add special tokens, as a chat template has written them.
    """

    text: str
    answers: list[tuple[int, int]]
    templated: bool


def document(text: str, tokenizer: Any) -> Prompted:
    """A text that is learned as a whole, with the end token behind it."""
    text += tokenizer.eos_token or ""
    return Prompted(text, [(0, len(text))], False)


def answered(prompt: str, answer: str, tokenizer: Any) -> Prompted:
    """A prompt and its answer: by the chat template if there is one, else on two lines, with the end token behind."""
    if has_chat_template(tokenizer):
        return conversation([_user(prompt), {"role": ASSISTANT, "content": answer}], tokenizer)
    start = f"{prompt}\n"
    text = start + answer + (tokenizer.eos_token or "")
    return Prompted(text, [(len(start), len(text))], False)


def conversation(messages: Sequence[Message], tokenizer: Any) -> Prompted:
    """A conversation in the tokenizer's chat template; all turns of the assistant are learned, with their end.

    A turn that the template writes in another way once others follow, as those of reasoning models do, is only read;
    the last turn is always learned.

    Raises:
        ValueError: If there is no chat template, it refuses the messages, or the last turn of the assistant cannot be
            found in what it writes.
    """
    whole = _applied(messages, tokenizer)
    answers: list[tuple[int, int]] = []
    found = False
    for number, message in enumerate(messages):
        if message["role"] == ASSISTANT:
            before = _applied(messages[:number], tokenizer, answer_next=True)
            turn = _applied(messages[: number + 1], tokenizer).rstrip()
            found = turn.startswith(before) and whole.startswith(turn) and len(turn) > len(before)
            answers += [(len(before), len(turn))] if found else []
    if not found:
        raise ValueError(
            "the last turn of the assistant cannot be found in what the chat template writes: it must write the same "
            "before a turn as with add_generation_prompt=True"
        )
    return Prompted(whole, answers, True)


def asked(prompt: str | Sequence[Message], tokenizer: Any) -> tuple[str, bool]:
    """What a model reads before it answers, and whether a chat template has written it.

    Args:
        prompt: A prompt, or the messages of a conversation.
        tokenizer: Tokenizer of transformers.
    """
    if not isinstance(prompt, str):
        return _applied(prompt, tokenizer, answer_next=True), True
    if has_chat_template(tokenizer):
        return _applied([_user(prompt)], tokenizer, answer_next=True), True
    return f"{prompt}\n", False


def joined(parts: Sequence[str]) -> str:
    """One prompt of several texts, such as an instruction and its input.

    >>> joined(["Translate.", "Guten Morgen"])
    'Translate.\\n\\nGuten Morgen'
    """
    return "\n\n".join(parts)


def text_of(value: Any) -> Any:
    """A text, or several texts joined to one; anything else as it is."""
    several = isinstance(value, list | tuple) and bool(value) and all(isinstance(part, str) for part in value)
    return joined(value) if several else value


def has_chat_template(tokenizer: Any) -> bool:
    """Whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def _user(prompt: str) -> Message:
    return {"role": "user", "content": prompt}


def _applied(messages: Sequence[Message], tokenizer: Any, answer_next: bool = False) -> str:
    from jinja2 import TemplateError

    if not has_chat_template(tokenizer):
        raise ValueError(
            "the tokenizer has no chat template, which messages need: use a checkpoint that was trained on "
            "instructions, set tokenizer.chat_template, or put prompt and answer in two fields"
        )
    try:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer_next)
    except (TemplateError, TypeError, KeyError) as error:
        raise ValueError(f"the chat template refuses the messages: {error}") from None
    return text
