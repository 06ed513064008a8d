"""How well the description of a class fits a text: by a sentence encoder, a masked or a causal language model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from evertune.lightning_modules.transformer import TransformerModule

TEXT, LABEL = "{text}", "{label}"
_UNLIMITED = 1_000_000
_CONTENT_FREE = "N/A"
"""A text without content, by which Zhao et al. measure what a language model prefers whatever it reads."""


class LabelScores(nn.Module, ABC):
    """Scores of descriptions for texts. What depends on the descriptions alone is computed once, by :meth:`prepare`.

    Args:
        template: Where text and description are put. None (default) is that of the class.

    Raises:
        ValueError: If the template lacks a placeholder, or has it in the wrong place.
    """

    auto_class: str
    """Class of transformers that makes the model."""
    template: str

    def __init__(self, template: str | None = None) -> None:
        super().__init__()
        self.template = self.template if template is None else template
        self.check_template()

    @abstractmethod
    def check_template(self) -> None:
        """Check the placeholders of the template."""

    @abstractmethod
    def prepare(self, module: TransformerModule, descriptions: Sequence[str]) -> None:
        """Compute what depends on the descriptions alone."""

    @abstractmethod
    def forward(self, module: TransformerModule, inputs: Mapping[str, Tensor]) -> Tensor:
        """The scores, fp32 ``[texts, descriptions]``, of tokenised texts."""

    def _refuse(self, expected: str) -> None:
        raise ValueError(f"template must have {expected}, got {self.template!r}")


class Similarity(LabelScores):
    """The cosine of a text and a description, as a sentence encoder maps both."""

    auto_class = "AutoModel"
    template = LABEL
    vectors: Tensor

    def check_template(self) -> None:
        """The text stands for itself."""
        if self.template.count(LABEL) != 1 or TEXT in self.template:
            self._refuse(f"{LABEL} once, and no {TEXT}")

    def prepare(self, module: TransformerModule, descriptions: Sequence[str]) -> None:
        """Encode the descriptions."""
        texts = [self.template.replace(LABEL, one) for one in descriptions]
        tokens = module.tokenizer(texts, truncation=True, padding=True, return_tensors="pt").to(module.device)
        self.register_buffer("vectors", _unit(module, tokens), persistent=False)

    def forward(self, module: TransformerModule, inputs: Mapping[str, Tensor]) -> Tensor:
        """The cosines."""
        return _unit(module, inputs) @ self.vectors.float().T


def _unit(module: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    return F.normalize(module.features(inputs).float(), dim=-1)


class _Prompted(LabelScores):
    """Scores of a language model, less those that it gives for a text without content."""

    prior: Tensor

    def __init__(self, template: str | None = None, calibrate: bool = True) -> None:
        super().__init__(template)
        self.calibrate = calibrate

    def prepare(self, module: TransformerModule, descriptions: Sequence[str]) -> None:
        """Tokenise the template and the descriptions, and score a text without content."""
        tokenizer = module.tokenizer
        self.opening, self.ending = _special_tokens(tokenizer)
        self.frame(tokenizer, descriptions)
        if self.room(module) < 1:
            raise ValueError(
                f"template, examples and descriptions have {self.n_around()} tokens, which leaves no room for a text: "
                f"{type(module.backbone).__name__} takes {module.max_tokens}"
            )
        self.register_buffer("prior", torch.zeros(len(descriptions), device=module.device), persistent=False)
        if self.calibrate:
            empty = tokenizer([_CONTENT_FREE], return_tensors="pt").to(module.device)
            self.prior = self(module, empty)[0]

    @abstractmethod
    def frame(self, tokenizer: Any, descriptions: Sequence[str]) -> None:
        """Tokenise the template and the descriptions."""

    @abstractmethod
    def n_around(self) -> int:
        """Number of tokens beside those of a text."""

    def room(self, module: TransformerModule) -> int:
        """Number of tokens of a text that are read."""
        return (module.max_tokens or _UNLIMITED) - self.n_around()

    def texts(self, module: TransformerModule, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """The tokens of each text without those around it, truncated to what the template leaves."""
        start, room = len(self.opening), self.room(module)
        there = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
        texts = [row[mask] for row, mask in there]
        return [text[start : len(text) - len(self.ending)][:room] for text in texts]


class Cloze(_Prompted):
    """The probability that a masked language model gives to the word for a class, in a blank beside the text.

    Schick & Schütze 2021, "Exploiting Cloze Questions for Few Shot Text Classification and Natural Language Inference".
    """

    auto_class = "AutoModelForMaskedLM"
    template = f"{TEXT} Category: {LABEL}."

    def check_template(self) -> None:
        """Text and blank stand anywhere, once each."""
        if self.template.count(LABEL) != 1 or self.template.count(TEXT) != 1:
            self._refuse(f"{TEXT} and {LABEL} once each")

    def frame(self, tokenizer: Any, descriptions: Sequence[str]) -> None:
        """Tokenise the template, and find the token of each word.

        Raises:
            ValueError: If a word is not one token.
        """
        before, after = self.template.split(TEXT)
        self.before, self.after = (_with_blank(part, tokenizer) for part in (before, after))
        words = [_tokens(tokenizer, f" {word}") for word in descriptions]
        for word, tokens in zip(descriptions, words, strict=True):
            if len(tokens) != 1 or tokens[0] == tokenizer.unk_token_id:
                raise ValueError(
                    f"method='cloze' needs a word of the vocabulary for each class, and {word!r} is not one: describe "
                    f"the class by another, as in descriptions={{{word!r}: 'word'}}"
                )
        self.words = [tokens[0] for tokens in words]
        self.mask_token_id = tokenizer.mask_token_id

    def n_around(self) -> int:
        """Number of tokens beside those of a text."""
        return len(self.opening) + len(self.before) + len(self.after) + len(self.ending)

    def forward(self, module: TransformerModule, inputs: Mapping[str, Tensor]) -> Tensor:
        """The log-probabilities of the words in the blank."""
        start, end = (
            torch.tensor(part, dtype=torch.long, device=module.device)
            for part in (self.opening + self.before, self.after + self.ending)
        )
        rows = [torch.cat([start, text, end]) for text in self.texts(module, inputs)]
        ids, mask = _padded(rows, module.tokenizer.pad_token_id, "right")
        logits = module.encode(input_ids=ids, attention_mask=mask).logits
        blank = (ids == self.mask_token_id).int().argmax(1)
        log_p = logits[torch.arange(len(rows)), blank].float().log_softmax(-1)
        scores: Tensor = log_p[:, self.words] - self.prior
        return scores


class Likelihood(_Prompted):
    """The log-likelihood of a description as what a causal language model writes after the text and the examples.

    Brown et al. 2020, "Language Models are Few-Shot Learners".
    """

    auto_class = "AutoModelForCausalLM"
    template = f"{TEXT}\nCategory: {LABEL}"

    def __init__(
        self, template: str | None = None, calibrate: bool = True, examples: Sequence[tuple[str, str]] = ()
    ) -> None:
        super().__init__(template, calibrate)
        self.examples = list(examples)

    def check_template(self) -> None:
        """The description stands at the end."""
        if self.template.count(LABEL) != 1 or self.template.count(TEXT) != 1 or not self.template.endswith(LABEL):
            self._refuse(f"{TEXT} once, and {LABEL} once, at the end")

    def frame(self, tokenizer: Any, descriptions: Sequence[str]) -> None:
        """Tokenise the examples, the template and the descriptions."""
        before, after = self.template.removesuffix(LABEL).split(TEXT)
        space = " " if after.endswith(" ") else ""  # which belongs to the token that follows it
        shown = "".join(
            self.template.replace(LABEL, description).replace(TEXT, text) + "\n\n"
            for text, description in self.examples
        )
        self.before = self.opening + _tokens(tokenizer, shown + before)
        self.after = _tokens(tokenizer, after.removesuffix(space))
        self.answers = [_tokens(tokenizer, space + one) for one in descriptions]

    def n_around(self) -> int:
        """Number of tokens beside those of a text."""
        return len(self.before) + len(self.after) + max(map(len, self.answers))

    def forward(self, module: TransformerModule, inputs: Mapping[str, Tensor]) -> Tensor:
        """The log-likelihoods. Answers of one token are read from one pass; each longer one takes a pass of its own."""
        device = module.device
        before, after = (torch.tensor(part, dtype=torch.long, device=device) for part in (self.before, self.after))
        prompts = [torch.cat([before, text, after]) for text in self.texts(module, inputs)]
        first = _after(module, prompts, [])[:, 0]
        scores = []
        for answer in self.answers:
            log_p = first[:, None] if len(answer) == 1 else _after(module, prompts, answer[:-1])
            tokens = torch.tensor(answer, device=device).expand(len(prompts), -1)
            scores.append(log_p.gather(2, tokens[..., None]).sum((1, 2)))
        return torch.stack(scores, 1) - self.prior


def _after(module: TransformerModule, prompts: Sequence[Tensor], answer: Sequence[int]) -> Tensor:
    """Log-probabilities of the next token after each prompt, and after each token of an answer to it.

    Returns:
        fp32 ``[prompts, 1 + tokens of the answer, vocabulary]``.
    """
    more = torch.tensor(answer, dtype=torch.long, device=module.device)
    ids, mask = _padded([torch.cat([one, more]) for one in prompts], module.tokenizer.pad_token_id, "left")
    n_last = len(answer) + 1
    places = (mask.cumsum(1) - 1).clamp(min=0)
    read = module.encode(
        input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False, logits_to_keep=n_last
    )
    last: Tensor = read.logits[:, -n_last:].float().log_softmax(-1)
    return last


def _tokens(tokenizer: Any, text: str) -> list[int]:
    tokens: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return tokens


def _with_blank(part: str, tokenizer: Any) -> list[int]:
    """The tokens of one side of a template, with the mask in the place of the description."""
    if LABEL not in part:
        return _tokens(tokenizer, part)
    before, after = part.split(LABEL)
    return [*_tokens(tokenizer, before.rstrip(" ")), tokenizer.mask_token_id, *_tokens(tokenizer, after)]


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after a text."""
    whole: list[int] = tokenizer(_CONTENT_FREE)["input_ids"]
    text = _tokens(tokenizer, _CONTENT_FREE)
    start = next(place for place in range(len(whole)) if whole[place : place + len(text)] == text)
    return whole[:start], whole[start + len(text) :]


def _padded(rows: Sequence[Tensor], token: int, side: Any) -> tuple[Tensor, Tensor]:
    """Rows of tokens as a batch, and its attention mask, both int64 ``[rows, longest]``."""
    ids = pad_sequence(list(rows), batch_first=True, padding_value=token, padding_side=side)
    return ids, pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
