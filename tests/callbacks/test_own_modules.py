"""LightningModules of existing projects: written by hand here, unchanged, with what they bring as batches."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from evertune._lightning import pl
from evertune.callbacks import EWC, ContinualEvaluation, Replay
from evertune.tasks.base import Outputs, Task
from tests.helpers.distributed import run_ranks
from tests.helpers.quiet import QUIET

VOCABULARY, TAGS, N = 24, 3, 8
SIZE = {"vocab_size": VOCABULARY}


class Own(pl.LightningModule):
    """A project of its own: a transformer, a training step, an optimizer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = self.build()
        self.step_loss: list[float] = []

    def build(self) -> Any:
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Tagger(Own):
    """Token classification with BERT."""

    def build(self) -> Any:
        from transformers import BertConfig, BertForTokenClassification

        size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
        still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return BertForTokenClassification(
            BertConfig(num_labels=TAGS, max_position_embeddings=12, **SIZE, **size, **still)
        )

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


class Translator(Own):
    """Sequence to sequence with T5, whose forward needs the labels."""

    def build(self) -> Any:
        from transformers import T5Config, T5ForConditionalGeneration

        size = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
        return T5ForConditionalGeneration(T5Config(dropout_rate=0.0, **SIZE, **size))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


class Writer(Own):
    """A causal language model: GPT-2, the output layer tied to the embeddings."""

    def build(self) -> Any:
        from transformers import GPT2Config, GPT2LMHeadModel

        size = {"n_positions": 12, "n_embd": 8, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
        still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2LMHeadModel(GPT2Config(**SIZE, **size, **still))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask)


OWN: dict[str, type[Own]] = {"tags": Tagger, "seq2seq": Translator, "causal": Writer}


def texts(kind: str, seed: int) -> list[dict[str, list[int]]]:
    """Sequences with what there is to learn: tags, the same in reverse, or themselves.

    They are of one length: the loss is a mean over tokens, which on two ranks is the mean of the means of both
    only where each has as many tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for length in [5] * 8:
        ids = torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()
        labels = {"tags": [-100] + [i % TAGS for i in ids[1:]], "seq2seq": ids[::-1], "causal": ids}[kind]
        examples.append({"input_ids": ids, "labels": labels})
    return examples


def pad(examples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    longest = max(len(example["input_ids"]) for example in examples)
    rows = {"input_ids": 0, "labels": -100}
    batch = {
        key: torch.tensor([example[key] + [fill] * (longest - len(example[key])) for example in examples])
        for key, fill in rows.items()
    }
    return {**batch, "attention_mask": (batch["input_ids"] != 0).long()}


WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))  # of these ranks; Lightning removes it after a fit


def learn(kind: str, strategy: str = "auto") -> dict[str, list[float]]:
    """Two experiences with all three callbacks; what they know afterwards, and the weights."""
    world = WORLD_SIZE if strategy != "auto" else 1
    module = OWN[kind]()
    evaluation = ContinualEvaluation()
    ewc = EWC(ewc_lambda=5.0, n_examples=6, batch_size=2)
    callbacks = [Replay(memory_size=4), ewc, evaluation]
    for seed in (1, 2):
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            devices=world,
            strategy=strategy,
            callbacks=callbacks,
            **QUIET,
            num_sanity_val_steps=0,
        )
        train, val = (DataLoader(texts(kind, s), batch_size=4 // world, collate_fn=pad) for s in (seed, seed + 10))  # type: ignore[arg-type, var-annotated]
        sampler = torch.utils.data.DistributedSampler(train.dataset, world, trainer.global_rank, shuffle=False)  # type: ignore[arg-type]
        train = DataLoader(train.dataset, batch_size=4 // world, sampler=sampler, collate_fn=pad)
        trainer.fit(module, train, val)
    from evertune.lightning_modules.saving import whole

    weights = torch.cat([whole(p).flatten() for p in module.parameters()])
    matrix = [[round(x, 6) for x in row[: t + 1]] for t, row in enumerate(evaluation.accuracy_matrix)]
    return {"matrix": [x for row in matrix for x in row], "weights": weights.tolist()}


def learn_all(strategy: str) -> dict[str, dict[str, list[float]]]:
    return {kind: learn(kind, strategy) for kind in OWN}


def test_own_modules_of_many_positions_learn_the_same_on_one_process_and_with_sharded_weights() -> None:
    """Under both Lightnings: EVERTUNE_LIGHTNING, or the package that is installed, decides which."""
    alone = learn_all("auto")
    for sharded in run_ranks("tests.callbacks.test_own_modules:learn_all", 2, strategy="evertune_deepspeed_stage_3"):
        for kind in OWN:
            assert min(alone[kind]["matrix"]) >= 0 and len(alone[kind]["matrix"]) == 3
            torch.testing.assert_close(torch.tensor(sharded[kind]["matrix"]), torch.tensor(alone[kind]["matrix"]))
            ours, theirs = torch.tensor(sharded[kind]["weights"]), torch.tensor(alone[kind]["weights"])
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


# --- shapes of projects


class Batch(NamedTuple):
    x: Tensor
    target: Tensor


@dataclass
class Fields:
    x: Tensor
    label: Tensor
    names: list[str] = field(default_factory=list)


def x(rows: list[int], *more: int) -> Tensor:
    return torch.randn(N, *more, 4, generator=torch.Generator().manual_seed(5))[rows]


def y(rows: list[int], *more: int, high: int = 3) -> Tensor:
    return torch.randint(0, high, (N, *more), generator=torch.Generator().manual_seed(6))[rows]


def encoding(rows: list[int]) -> Any:
    from transformers import BatchEncoding

    return BatchEncoding({"x": x(rows), "labels": y(rows)})


class Project(pl.LightningModule):
    """Two layers; a shape says how it is called and what its loss is."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, outputs)
        self.steps = 0

    def net(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(inputs).tanh())

    def loss(self, batch: Any) -> Tensor:
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.steps += 1

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def project(loss: Callable[[Any, Any], Tensor], forward: Any = None, outputs: int = 3, **more: Any) -> Any:
    members = {"loss": loss, **({"forward": forward} if forward else {}), **more}
    return type("Shape", (Project,), members)(outputs)


def ce(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module.net(batch["x"]), batch["labels"])


def no_loss(module: Any, batch: Any) -> Tensor:
    return next(module.parameters()).sum() * 0


class OwnTask(Task):
    def outputs(self, module: Any, batch: Any) -> Outputs:
        return Outputs(module.net(batch["inputs"]), batch["gold"], "categorical")

    def score(self, module: Any, batch: Any) -> Tensor:
        return (module.net(batch["inputs"]).argmax(1) == batch["gold"]).float()


def with_task() -> Any:
    module = project(lambda m, b: F.cross_entropy(m.net(b["inputs"]), b["gold"]))
    module.task = OwnTask()
    return module


WORKS, EWC_ASKS, BOTH_ASK = "works", "EWC asks for logits", "both ask"
SHAPES: dict[str, tuple[Callable[[], Any], Callable[[list[int]], Any], str]] = {
    "dict": (lambda: project(ce, lambda m, x: m.net(x)), lambda r: {"x": x(r), "labels": y(r)}, WORKS),
    "extra keys": (
        lambda: project(ce, lambda m, x: m.net(x)),
        lambda r: {"x": x(r), "labels": y(r), "names": [str(i) for i in r]},
        WORKS,
    ),
    "whole batch": (
        lambda: project(ce, lambda m, batch: m.net(batch["x"])),
        lambda r: {"x": x(r), "labels": y(r)},
        WORKS,
    ),
    "batch encoding": (lambda: project(ce, lambda m, x: m.net(x)), encoding, WORKS),
    "tuple": (
        lambda: project(lambda m, b: F.cross_entropy(m.net(b[0]), b[1]), lambda m, x: m.net(x)),
        lambda r: (x(r), y(r)),
        WORKS,
    ),
    "list": (
        lambda: project(lambda m, b: F.cross_entropy(m.net(b[0]), b[1]), lambda m, x: m.net(x)),
        lambda r: [x(r), y(r)],
        WORKS,
    ),
    "named tuple": (
        lambda: project(lambda m, b: F.cross_entropy(m.net(b.x), b.target), lambda m, x: m.net(x)),
        lambda r: Batch(x(r), y(r)),
        WORKS,
    ),
    "dataclass": (
        lambda: project(lambda m, b: F.cross_entropy(m.net(b.x), b.label), lambda m, x: m.net(x)),
        lambda r: Fields(x(r), y(r), [str(i) for i in r]),
        WORKS,
    ),
    "dict output": (
        lambda: project(ce, lambda m, x: {"logits": m.net(x)}),
        lambda r: {"x": x(r), "labels": y(r)},
        WORKS,
    ),
    "attribute output": (
        lambda: project(ce, lambda m, x: SimpleNamespace(logits=m.net(x))),
        lambda r: {"x": x(r), "labels": y(r)},
        WORKS,
    ),
    "several outputs": (
        lambda: project(ce, lambda m, x: (m.net(x), m.body(x))),
        lambda r: {"x": x(r), "labels": y(r)},
        EWC_ASKS,
    ),
    "named outputs": (
        lambda: project(ce, lambda m, x: {"start": m.net(x), "end": m.net(x)}),
        lambda r: {"x": x(r), "labels": y(r)},
        EWC_ASKS,
    ),
    "no forward": (lambda: project(ce), lambda r: {"x": x(r), "labels": y(r)}, EWC_ASKS),
    "yes or no": (
        lambda: project(
            lambda m, b: F.binary_cross_entropy_with_logits(m.net(b[0])[:, 0], b[1]), lambda m, x: m.net(x)[:, 0], 1
        ),
        lambda r: (x(r), y(r, high=2).float()),
        WORKS,
    ),
    "regression": (
        lambda: project(lambda m, b: F.mse_loss(m.net(b[0]), b[1]), lambda m, x: m.net(x), 1),
        lambda r: (x(r), x(r)[:, :1]),
        WORKS,
    ),
    "many numbers": (
        lambda: project(lambda m, b: F.mse_loss(m.net(b[0]), b[1]), lambda m, x: m.net(x)),
        lambda r: (x(r), x(r)[:, :3]),
        WORKS,
    ),
    "several labels": (
        lambda: project(lambda m, b: F.binary_cross_entropy_with_logits(m.net(b[0]), b[1]), lambda m, x: m.net(x)),
        lambda r: (x(r), y(r, 3, high=2).float()),
        WORKS,
    ),
    "tags": (
        lambda: project(
            lambda m, b: F.cross_entropy(m.net(b["x"]).flatten(0, 1), b["labels"].flatten()), lambda m, x: m.net(x)
        ),
        lambda r: {"x": x(r, 5), "labels": y(r, 5).masked_fill(y(r, 5) == 0, -100)},
        WORKS,
    ),
    "classes second": (
        lambda: project(
            lambda m, b: F.cross_entropy(m.net(b["x"]).movedim(-1, 1), b["labels"]),
            lambda m, x: m.net(x).movedim(-1, 1),
        ),
        lambda r: {"x": x(r, 5), "labels": y(r, 5)},
        BOTH_ASK,
    ),
    "no targets": (
        lambda: project(lambda m, b: m.net(b["x"]).square().mean(), lambda m, x: m.net(x)),
        lambda r: {"x": x(r)},
        WORKS,
    ),
    "nested targets": (
        lambda: project(lambda m, b: F.cross_entropy(m.net(b["x"]), b["meta"]["class"]), lambda m, x: m.net(x)),
        lambda r: {"x": x(r), "meta": {"class": y(r)}},
        WORKS,
    ),
    "several targets": (
        lambda: project(lambda m, b: F.cross_entropy(m.net(b["x"]), b["labels"]["a"]), lambda m, x: m.net(x)),
        lambda r: {"x": x(r), "labels": {"a": y(r), "b": y(r)}},
        "evaluation asks",
    ),
    "contrast": (
        lambda: project(
            lambda m, b: F.cross_entropy(m.net(b["x"]) @ m.net(b["x"]).T, torch.arange(len(b["x"]))),
            lambda m, x: m.net(x) @ m.net(x).T,
        ),
        lambda r: {"x": x(r)},
        BOTH_ASK,
    ),
    "manual steps": (
        lambda: project(no_loss, automatic_optimization=False),
        lambda r: {"x": x(r)},
        BOTH_ASK,
    ),
    "own task": (with_task, lambda r: {"inputs": x(r), "gold": y(r)}, WORKS),
}


class Streamed(IterableDataset[int]):
    """Counts how often it is read."""

    def __init__(self) -> None:
        self.given = 0

    def __iter__(self) -> Iterator[int]:
        for row in range(N):
            self.given += 1
            yield row


def fit(module: Any, batch_of: Any, callback: Any, train: Any = None) -> pl.Trainer:
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[callback],
        **QUIET,
        num_sanity_val_steps=0,
    )
    rows = list(range(N))
    trainer.fit(
        module,
        DataLoader(train if train is not None else rows, batch_size=3, collate_fn=batch_of),  # type: ignore[arg-type]
        DataLoader(rows, batch_size=4, collate_fn=batch_of),  # type: ignore[arg-type]
    )
    return trainer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape", SHAPES)
def test_a_project_works_or_is_refused_before_the_first_step(shape: str) -> None:
    make, batch_of, expected = SHAPES[shape]
    for callback, advice, refused in (
        (EWC(n_examples=5, batch_size=2), "logits=", expected in (EWC_ASKS, BOTH_ASK)),
        (ContinualEvaluation(), "score=", expected in ("evaluation asks", BOTH_ASK)),
    ):
        module: Any = make()
        if refused:
            with pytest.raises(ValueError, match=f"(EWC|ContinualEvaluation) cannot .*{advice}"):
                fit(module, batch_of, callback)
            assert module.steps == 0 and callback.experience_index == 0
        else:
            fit(module, batch_of, callback)
            assert module.steps == 3 and callback.experience_index == 1
            if isinstance(callback, ContinualEvaluation):
                assert torch.tensor(callback.accuracy_matrix).isfinite().all()
            else:
                assert sum(float(t.sum()) for t in callback.tensors["importance"]) > 0


@pytest.mark.filterwarnings("ignore")
def test_trying_changes_nothing_and_takes_nothing_from_a_stream() -> None:
    def draw(module: Any, batch: Any) -> Tensor:
        return F.cross_entropy(F.dropout(module.net(batch["x"]), 0.5), batch["labels"])

    states = []
    for callback in (pl.Callback(), EWC(n_examples=5), ContinualEvaluation()):
        module, stream = project(draw, lambda m, x: m.net(x)), Streamed()
        torch.manual_seed(3)
        fit(module, lambda r: {"x": x(r), "labels": y(r)}, callback, stream)
        assert module.steps == 3 and stream.given == N and module.training
        states.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


def test_features_that_cannot_be_compared_are_found_before_the_first_step() -> None:
    module = project(ce, lambda m, x: m.net(x))
    replay = Replay(4, "herding", label=lambda row: "one", features=lambda m, batch: m.net(batch["x"])[0])
    with pytest.raises(ValueError, match=r"shape \[batch, d\], got \[3\]; pass features="):
        fit(module, lambda r: {"x": x(r), "labels": y(r)}, replay)
    assert module.steps == 0 and replay.experience_index == 0
