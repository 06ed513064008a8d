"""Text classification by the names and descriptions of the classes, from no labels or a few."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from evertune.lightning_modules.backbone import Attention, Pooling, load_backbone, resolve_pooling
from evertune.lightning_modules.label_scores import Cloze, Likelihood, Similarity
from evertune.lightning_modules.sequence_classification import SequenceClassificationModule
from evertune.utils.batches import without_targets
from evertune.utils.evaluation import evaluation_mode

ZeroShotMethod = Literal["similarity", "cloze", "likelihood"]


class ZeroShotOutput(NamedTuple):
    """The output for a batch.

    Args:
        logits: Logits [batch, classes], in the order of ``module.classes``.
    """

    logits: Tensor


class ZeroShotClassificationModule(SequenceClassificationModule):
    """A pretrained transformer that classifies texts by what the classes are called, without being trained.

    It is there before the first label: as a baseline, to label records that it is sure of
    (:class:`~evertune.live.pseudo_labels.PseudoLabeller`), or to answer until there is a trained version. Its
    interface is that of :class:`SequenceClassificationModule`, but there is nothing to fit.

    Each class has one or more descriptions, its name by default. The logit of a class is the mean of their scores:

    - ``similarity``: cosine of text and description, by a sentence encoder, over ``temperature``;
    - ``cloze``: log-probability of the word for the class in a blank beside the text, by a masked language model
      (Schick & Schütze 2021, "Exploiting Cloze Questions for Few Shot Text Classification and Natural Language
      Inference");
    - ``likelihood``: log-likelihood of the description after the text, by a causal language model, which can be shown
      ``examples`` first (Brown et al. 2020, "Language Models are Few-Shot Learners").

    A language model prefers some words whatever it reads. With ``calibrate``, what it gives for the text ``N/A`` is
    subtracted (Zhao et al. 2021, "Calibrate Before Use: Improving Few-Shot Performance of Language Models").

    Args:
        model_name_or_path: Name on the Hugging Face hub, folder, or ``package:NAME/FOLDER`` (in an installed package).
        classes: Names of the classes known so far. Default: none.
        descriptions: For a class, a description or several in the place of its name; classes that are added later may
            be among them. With ``cloze``, each is one word of the model's vocabulary. Default: the names.
        method: ``similarity`` (default), ``cloze`` or ``likelihood``.
        template: Text with ``{label}`` for the description and, with the language models, ``{text}`` for the text.
            Default: ``{label}``; ``{text} Category: {label}.``; ``{text}`` and ``Category: {label}`` on two lines.
            Special tokens, such as those of a chat template, may be part of it.
        examples: With ``likelihood``, pairs of a text and the name of its class, shown in this order before each text.
            Default: none.
        calibrate: With the language models, whether to subtract the scores of a text without content. Default: True.
        temperature: With ``similarity``, what the cosines are divided by. Default: 0.05, as in SimCSE (Gao et al.
            2021). It changes how sure the answers are, not which class is the most probable.
        pooling: ``auto`` (default), ``mean``, ``cls`` or ``last``, see :class:`SequenceClassificationModule`.
        attention: ``auto`` (default), ``sdpa`` or ``eager``, see :class:`TransformerModule`.

    Raises:
        ValueError: If an argument is out of range, or an example has an unknown class. When the weights are loaded, if
            the model lacks what the method needs, a word is not one token, or template and examples leave no room for
            a text. When ``fit`` starts.

    Example::

        module = ZeroShotClassificationModule(
            "sentence-transformers/all-MiniLM-L6-v2",
            classes=["billing", "login"],
            descriptions={"login": ["I cannot sign in", "password and account access"]},
        )
        module.predict(["My card was charged twice."])  # [{"billing": 0.9, "login": 0.1}]
    """

    def __init__(
        self,
        model_name_or_path: str,
        *,
        classes: Sequence[str] = (),
        descriptions: Mapping[str, str | Sequence[str]] | None = None,
        method: ZeroShotMethod = "similarity",
        template: str | None = None,
        examples: Sequence[Sequence[str]] = (),
        calibrate: bool = True,
        temperature: float = 0.05,
        pooling: Pooling = "auto",
        attention: Attention = "auto",
    ) -> None:
        if method not in get_args(ZeroShotMethod):
            raise ValueError(f"method must be one of {list(get_args(ZeroShotMethod))}, got {method!r}")
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        if examples and method != "likelihood":
            raise ValueError(f"examples are shown to causal language models only: method={method!r} takes none")
        described = {
            name: [given] if isinstance(given, str) else list(given) for name, given in (descriptions or {}).items()
        }
        if empty := [name for name, given in described.items() if not all(given) or not given]:
            raise ValueError(f"the descriptions of {empty[0]!r} must not be empty, got {described[empty[0]]!r}")
        if unknown := [label for _, label in examples if label not in classes]:
            raise ValueError(f"an example has the class {unknown[0]!r}, which is none of {list(classes)}")
        super().__init__(
            model_name_or_path,
            classes=classes,
            pooling=pooling,
            attention=attention,
            warmup_ratio=0.0,
            schedule="constant",
            freeze_layers=-1,
            dropout=0.0,
        )
        self.keep_hparams_of(ZeroShotClassificationModule)
        self.descriptions = described
        self.temperature = temperature if method == "similarity" else 1.0
        self.scorer: Similarity | Cloze | Likelihood
        if method == "similarity":
            self.scorer = Similarity(template)
        elif method == "cloze":
            self.scorer = Cloze(template, calibrate)
        else:
            self.scorer = Likelihood(
                template, calibrate, [(text, self.described(label)[0]) for text, label in examples]
            )

    def described(self, name: str) -> list[str]:
        """The descriptions of a class; its name if there are none."""
        return self.descriptions.get(name, [name])

    # --- the model

    def load_backbone(self) -> Any:
        """The pretrained transformer, with the output layer that the method needs."""
        return load_backbone(self.model_name_or_path, 0.0, self.attention, self.scorer.auto_class)

    def configure_head(self) -> None:
        """Compute what depends on the classes alone."""
        self._pooling = resolve_pooling(self.pooling, self.backbone.config)
        self._grow()

    def _grow(self) -> None:
        """Score by the descriptions of the classes named so far."""
        if self.backbone is not None and self._classes:
            with evaluation_mode(self):
                self.scorer.prepare(self, [text for name in self._classes for text in self.described(name)])

    def forward(self, **inputs: Any) -> Any:
        """Class scores of a batch of tokenised texts: ``module(input_ids=..., attention_mask=...)``."""
        scores = self.scorer(self, inputs) / self.temperature
        counts = [len(self.described(name)) for name in self._classes]
        return ZeroShotOutput(torch.stack([part.mean(1) for part in scores.split(counts, 1)], 1))

    def features(self, batch: Mapping[str, Any]) -> Tensor:
        """The pooled texts of a batch [batch, features], before the output layer of a language model."""
        inputs = {name: value for name, value in without_targets(batch).items() if name in self._inputs}
        return self.pooled(self.backbone.base_model(**inputs).last_hidden_state, inputs)

    # --- no training

    def setup(self, stage: str) -> None:
        """Refuse ``fit``.

        Raises:
            ValueError: If ``stage`` is ``fit``.
        """
        if stage == "fit":
            raise ValueError(
                f"{type(self).__name__} is not trained: fit a SequenceClassificationModule, or an "
                "AnalyticClassificationModule for a few labels"
            )
        super().setup(stage)
