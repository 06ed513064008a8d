"""The Fisher is what a loop over single examples in double precision gives, however the examples are batched."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from evertune.importance import estimate_fisher
from evertune.strategies.shards import ReplicatedShards

EXAMPLES, CLASSES = 13, 3
LENGTHS = [5, 2, 7, 4, 7, 3, 6, 5, 1, 7, 2, 4, 6]


class Bert(pl.LightningModule):
    """A tiny BERT with padding, a pooler, and dropout that must not act."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertForSequenceClassification

        size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
        config = BertConfig(vocab_size=30, max_position_embeddings=12, num_labels=CLASSES, **size)
        self.model = BertForSequenceClassification(config)

    def forward(self, **inputs: Tensor) -> Any:
        return self.model(**inputs)

    @staticmethod
    def batch(rows: range) -> dict[str, Tensor]:
        ids, mask = tokens(rows)
        return {"input_ids": ids, "attention_mask": mask, "labels": targets(rows)}


class Gpt2(pl.LightningModule):
    """A tiny GPT-2 whose class scores are those of three words: the output layer is tied to the embeddings."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        size = {"vocab_size": 30, "n_positions": 12, "n_embd": 16, "n_layer": 2, "n_head": 2}
        self.model = GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **size))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        last = attention_mask.sum(1) - 1
        return logits[torch.arange(len(logits)), last, :CLASSES]

    batch = staticmethod(Bert.batch)


class CosineHead(nn.Module):
    """A layer of the user's own."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CLASSES, features))
        self.scale = nn.Parameter(torch.tensor(4.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * nn.functional.linear(nn.functional.normalize(x), nn.functional.normalize(self.weight))


class Vision(pl.LightningModule):
    """Convolutions and norms of every kind, a layer used twice, in-place activations; batches are tuples."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 3, padding="same", dilation=2, groups=2, padding_mode="circular"),
            nn.GroupNorm(2, 4),
            nn.SiLU(inplace=True),
        )
        self.twice = nn.Conv2d(4, 4, (1, 3), padding="same")
        self.norm = nn.Sequential(nn.RMSNorm(16), nn.LayerNorm((4, 16)), nn.Dropout(0.5))
        self.line = nn.Conv1d(4, 4, 3, dilation=2)
        self.unused = nn.Linear(2, 2)
        self.head = CosineHead(48)
        with torch.no_grad():
            self.body[1].running_mean += 0.1
            self.body[1].running_var += 0.5

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        x = self.norm(self.twice(self.twice(x).tanh()).flatten(2))
        return self.head(self.line(x).flatten(1))

    @staticmethod
    def batch(rows: range) -> tuple[Tensor, Tensor]:
        x = torch.randn(EXAMPLES, 2, 8, 8, generator=torch.Generator().manual_seed(1))
        return x[rows.start : rows.stop], targets(rows)


class Awkward(pl.LightningModule):
    """What no rule reaches: a bare parameter beside sublayers, weights used by another layer, the sequence first."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.randn(1, 6))
        self.encoder = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.3)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder((x + self.prompt).transpose(0, 1))
        return self.head(x.mean(0))

    @staticmethod
    def batch(rows: range) -> tuple[Tensor, Tensor]:
        x = torch.randn(EXAMPLES, 4, 6, generator=torch.Generator().manual_seed(1))
        return x[rows.start : rows.stop], targets(rows)


MODELS = {"bert": Bert, "gpt2": Gpt2, "vision": Vision, "awkward": Awkward}


def tokens(rows: range) -> tuple[Tensor, Tensor]:
    ids = torch.randint(1, 30, (EXAMPLES, 7), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor(LENGTHS)[rows.start : rows.stop]
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return ids[rows.start : rows.stop, : mask.shape[1]] * mask, mask


def targets(rows: range) -> Tensor:
    return torch.randint(0, CLASSES, (EXAMPLES,), generator=torch.Generator().manual_seed(2))[rows.start : rows.stop]


def build(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name]()


def by_loop(module: Any, estimator: str) -> list[Tensor]:
    """The definition: examples one at a time, in double precision, by autograd on the log-likelihood."""
    module = module.double().eval()
    parameters = list(module.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    for row in range(EXAMPLES):
        batch = module.batch(range(row, row + 1))
        if isinstance(batch, dict):
            label = batch.pop("labels")
            output = module(**batch)
        else:
            *inputs, label = batch
            output = module(*(x.double() for x in inputs))
        log_p = getattr(output, "logits", output).log_softmax(-1)[0]
        weights = log_p.detach().exp() if estimator == "exact" else nn.functional.one_hot(label[0], CLASSES)
        for k in range(CLASSES):
            gradients = torch.autograd.grad(log_p[k], parameters, retain_graph=True, materialize_grads=True)
            for squares, gradient in zip(total, gradients, strict=True):
                squares.add_(weights[k] * gradient.square())
    return [(squares / EXAMPLES).flatten().float() for squares in total]


def fisher(name: str, size: int, estimator: str, **settings: Any) -> list[Tensor]:
    module = build(name)
    batches = (module.batch(range(at, min(at + size, EXAMPLES))) for at in range(0, EXAMPLES, size))
    return estimate_fisher(module, batches, ReplicatedShards(module), estimator, **settings)  # type: ignore[arg-type]


def assert_same(ours: list[Tensor], theirs: list[Tensor], rtol: float = 1e-4) -> None:
    scale = max(float(t.max()) for t in theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-7 * scale)


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
@pytest.mark.parametrize("name", MODELS)
def test_equals_a_double_precision_loop_over_single_examples(name: str, estimator: str) -> None:
    assert_same(fisher(name, 5, estimator), by_loop(build(name), estimator))
