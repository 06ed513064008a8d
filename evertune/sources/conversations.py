"""Conversations: lists of messages, each with a role and a content, as chat templates of transformers take them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from evertune.sources.values import is_utf8

Message = dict[str, Any]
ASSISTANT = "assistant"
"""The role whose turns are learned."""


def messages_value(value: Any) -> list[Message]:
    """The messages of a conversation with at least one answer, without keys that are None.

    Args:
        value: Mappings with ``role`` and ``content``, both texts. Further keys, such as ``tool_calls``, are kept for
            the chat template.

    Raises:
        ValueError: If it is not a conversation, or no turn of the assistant says anything.

    Example:
        >>> messages_value([{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4", "name": None}])
        [{'role': 'user', 'content': '2 + 2?'}, {'role': 'assistant', 'content': '4'}]
        >>> messages_value([{"role": "user", "content": "2 + 2?"}])
        Traceback (most recent call last):
        ValueError: the conversation has no turn of the assistant, so there is no answer to learn
    """
    if isinstance(value, str | bytes) or not isinstance(value, Sequence) or not value:
        raise ValueError("a conversation is a list of messages, each with role and content, and not empty")
    messages = [_message(number, one) for number, one in enumerate(value, 1)]
    answers = [(number, one) for number, one in enumerate(messages, 1) if one["role"] == ASSISTANT]
    if not answers:
        raise ValueError("the conversation has no turn of the assistant, so there is no answer to learn")
    for number, one in answers:
        if not one["content"].strip() and not one.get("tool_calls"):
            raise ValueError(f"message {number}, a turn of the assistant, is empty")
    return messages


def conversation_in(text: Any) -> list[Message] | None:
    """The messages of a conversation, given as a list or as the JSON text of one; None for any other text.

    Raises:
        ValueError: As :func:`messages_value`.

    Example:
        >>> conversation_in('[{"role": "assistant", "content": "Hello"}]'), conversation_in("Once upon a time")
        ([{'role': 'assistant', 'content': 'Hello'}], None)
    """
    if isinstance(text, str):
        if not text.lstrip().startswith("["):
            return None
        try:
            text = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(text, list) or not all(isinstance(one, dict) and "role" in one for one in text) or not text:
            return None
    return messages_value(text)


def _message(number: int, value: Any) -> Message:
    if not isinstance(value, Mapping):
        raise ValueError(f"message {number} is a {type(value).__name__}, not a mapping with role and content")
    message = {str(key): part for key, part in value.items() if part is not None}
    if message.get("tool_calls"):
        message.setdefault("content", "")
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            raise ValueError(f"message {number} has no text as its {key}")
    if not is_utf8([message["role"], message["content"]]):
        raise ValueError(f"message {number} has a lone surrogate, which no encoding can write")
    return message
