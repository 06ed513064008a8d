"""The Fisher is what a loop over single examples in double precision gives, however the examples are batched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from evertune._lightning import pl
from evertune.importance import IndexedBatch, estimate_fisher
from evertune.shards.replicated import ReplicatedShards
from evertune.shards.shards import Fragment

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


@pytest.mark.parametrize("estimator", ["exact", "sampled", "empirical"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "vision"])
def test_batch_free_importance(name: str, estimator: str) -> None:
    alone = fisher(name, 1, estimator)
    for size in (7, 64):
        assert_same(fisher(name, size, estimator), alone)


def test_the_default_is_exact_for_few_classes_and_sampled_for_many() -> None:
    assert_same(fisher("vision", 5, "auto"), fisher("vision", 5, "exact"), rtol=0)
    torch.manual_seed(0)
    module = Wide(33)
    batch = (torch.randn(6, 4), torch.zeros(6).long())
    ours = estimate_fisher(module, [batch], ReplicatedShards(module))
    sampled = estimate_fisher(module, [batch], ReplicatedShards(module), "sampled")
    assert torch.equal(ours[0], sampled[0])


class Wide(pl.LightningModule):
    """Many classes; the last ones may be hidden."""

    def __init__(self, classes: int, hidden: int = 0) -> None:
        super().__init__()
        self.layer, self.hidden = nn.Linear(4, classes), hidden

    def forward(self, x: Tensor) -> Tensor:
        scores = self.layer(x)
        hide = torch.arange(scores.shape[1]) >= scores.shape[1] - self.hidden
        return scores.masked_fill(hide, -torch.inf)


def test_sampled_labels_come_to_the_exact_expectation_and_change_with_the_seed() -> None:
    torch.manual_seed(0)
    module, shards = (m := Wide(4)), ReplicatedShards(m)
    inputs = torch.randn(10, 4).repeat(400, 1)
    exact = estimate_fisher(module, [(inputs, None)], shards, "exact")
    sampled = estimate_fisher(module, [(inputs, None)], shards, "sampled", seed=1)
    other = estimate_fisher(module, [(inputs, None)], shards, "sampled", seed=2)
    torch.testing.assert_close(sampled[0], exact[0], rtol=0.15, atol=0.01)
    assert not torch.equal(sampled[0], other[0])


@pytest.mark.parametrize("estimator", ["exact", "sampled"])
def test_hidden_classes_have_no_importance_and_do_not_disturb_the_others(estimator: Any) -> None:
    torch.manual_seed(0)
    hiding, plain = Wide(5, hidden=2), Wide(3)
    plain.layer.weight.data.copy_(hiding.layer.weight[:3])
    plain.layer.bias.data.copy_(hiding.layer.bias[:3])
    batch = (torch.randn(6, 4), torch.zeros(6).long())
    ours = estimate_fisher(hiding, [batch], ReplicatedShards(hiding), estimator)[0].view(5, 4)
    theirs = estimate_fisher(plain, [batch], ReplicatedShards(plain), estimator)[0].view(3, 4)
    torch.testing.assert_close(ours[:3], theirs)
    assert not ours[3:].any()


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_multi_label_targets_have_a_bernoulli_likelihood_each(estimator: Any) -> None:
    torch.manual_seed(0)
    module, inputs = Wide(3), torch.randn(6, 4)
    labels = torch.randint(0, 2, (6, 3))
    ours = estimate_fisher(module, [(inputs, labels)], ReplicatedShards(module), estimator)[0].view(3, 4)
    p = module(inputs).sigmoid().detach()
    weights = p * (1 - p) if estimator == "exact" else (labels - p).square()
    torch.testing.assert_close(ours, weights.T @ inputs.square() / 6)


@pytest.mark.parametrize("name", ["vision", "awkward"])
def test_batched_is_the_square_of_the_batch_means(name: str) -> None:
    module = build(name).eval()
    parameters = list(module.parameters())
    expected = [torch.zeros_like(p) for p in parameters]
    for at in range(0, EXAMPLES, 5):
        x, labels = module.batch(range(at, min(at + 5, EXAMPLES)))
        loss = nn.functional.cross_entropy(module(x), labels)
        gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
        for total, gradient in zip(expected, gradients, strict=True):
            total.add_(gradient.square(), alpha=len(labels) / EXAMPLES)
    assert_same(fisher(name, 5, "batched"), [total.flatten() for total in expected])


def test_padding_examples_count_nothing() -> None:
    module = build("vision")
    batches = [IndexedBatch(module.batch(range(0, 8)), range(8))]
    x, labels = module.batch(range(8, EXAMPLES))
    filled = (torch.cat([x, x[:3]]), torch.cat([labels, labels[:3]]))
    batches.append(IndexedBatch(filled, [*range(8, EXAMPLES), -1, -1, -1]))
    assert_same(estimate_fisher(module, batches, ReplicatedShards(module), "sampled"), fisher("vision", 64, "sampled"))


@pytest.mark.parametrize("name", ["vision", "awkward"])
def test_nothing_is_left_changed(name: str) -> None:
    module = build(name).train()
    last = list(module.children())[-1].eval()
    frozen = next(module.parameters()).requires_grad_(False)
    shards = ReplicatedShards(module)
    for fragment_gradient in shards.gradients():
        fragment_gradient.fill_(3.0)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    result = estimate_fisher(module, [module.batch(range(4))], shards)
    assert [len(values) for values in result] == [fragment.numel for fragment in shards.fragments]
    assert module.training and not last.training and not frozen.requires_grad and frozen.grad is None
    assert all(p.requires_grad and bool((p.grad == 3).all()) for p in module.parameters() if p is not frozen)
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    assert not any(layer._forward_hooks for layer in module.modules())
    assert torch.backends.mha.get_fastpath_enabled()


def test_compiled_layers_count_as_the_layers_they_are() -> None:
    module = build("bert")
    for layer in module.model.bert.encoder.layer:
        layer.compile(backend="eager")
    batch = module.batch(range(EXAMPLES))
    module(**batch)  # compiled by now
    assert_same(estimate_fisher(module, [batch], ReplicatedShards(module), "exact"), fisher("bert", EXAMPLES, "exact"))


def test_a_failing_model_is_left_as_it_was() -> None:
    module = build("vision").train()

    def fail(*_: Any) -> Tensor:
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        estimate_fisher(module, [module.batch(range(4))], ReplicatedShards(module), logits=fail)
    assert module.training and all(p.requires_grad for p in module.parameters())
    assert not any(layer._forward_hooks for layer in module.modules())


def test_half_precision_forward_passes_give_nearly_the_same() -> None:
    module = build("bert")
    half = estimate_fisher(
        module,
        [module.batch(range(EXAMPLES))],
        ReplicatedShards(module),
        "exact",
        forward_context=lambda: torch.autocast("cpu", torch.bfloat16),
    )
    full = fisher("bert", 64, "exact")
    assert all(values.dtype == torch.float32 for values in half)
    for a, b in zip(half, full, strict=True):
        assert float((a - b).norm()) <= 0.1 * float(b.norm()) + 1e-6


@pytest.mark.parametrize(
    ("batch", "estimator", "message"),
    [
        ((torch.zeros(2, 4), torch.zeros(2).long()), "fisher", "unknown estimator 'fisher'; expected one of auto"),
        ((torch.zeros(2, 4), torch.tensor([0, 3])), "empirical", r"labels must be in \[0, 3\), got 0 to 3"),
        ((torch.zeros(2, 4), torch.tensor([0.5, 1.0])), "empirical", "targets must be class numbers"),
        ((torch.zeros(2, 4), ["a", "b"]), "empirical", "targets must be class numbers.* got list"),
        ((torch.zeros(2, 3, 4), torch.tensor([0, 1])), "exact", r"targets of shape \[1\] do not fit .* \[1, 3, 3\]"),
        ((torch.zeros(2, 3, 4), None), "exact", r"logits of shape \[1, 3, 3\] need targets: .*; pass targets="),
        ((torch.full((2, 4), torch.nan), torch.tensor([0, 1])), "exact", "logits are not finite"),
        (IndexedBatch((torch.zeros(2, 4), None), [0]), "exact", "as many indices, got 1"),
    ],
)
def test_what_is_refused(batch: Any, estimator: Any, message: str) -> None:
    module = Wide(3)
    with pytest.raises(ValueError, match=message):
        estimate_fisher(module, [batch], ReplicatedShards(module), estimator)


class Tagger(pl.LightningModule):
    """A class for each token, from that token and the one before it."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 6)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, classes)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        return self.head(self.norm(x + x.cumsum(1).tanh()))

    @staticmethod
    def batch(rows: range, side: str = "right") -> dict[str, Tensor]:
        """Padded to the longest of these rows; every example has a target that does not count."""
        ids, mask = tokens(rows)
        labels = torch.randint(0, CLASSES, (EXAMPLES, 7), generator=torch.Generator().manual_seed(3))
        labels = labels[rows.start : rows.stop, : mask.shape[1]].masked_fill(mask == 0, -100)
        labels[:, 0] = -100
        return {"input_ids": ids, "labels": labels}


def tagger_by_loop(estimator: str) -> list[Tensor]:
    """The definition: the square of the gradient of the sum over positions, or its expectation position by position."""
    torch.manual_seed(0)
    module = Tagger().double().eval()
    parameters = list(module.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    for row in range(EXAMPLES):
        batch = Tagger.batch(range(row, row + 1))
        labels = batch.pop("labels")[0]
        log_p = module(**batch).log_softmax(-1)[0]
        at = (labels != -100).nonzero().flatten().tolist()
        if estimator == "empirical":
            terms = [(1.0, sum((log_p[t, labels[t]] for t in at), start=log_p.sum() * 0))]
        else:
            terms = [(float(log_p[t, k].detach().exp()), log_p[t, k]) for t in at for k in range(CLASSES)]
        for weight, value in terms:
            gradients = torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True)
            for squares, gradient in zip(total, gradients, strict=True):
                squares.add_(weight * gradient.square())
    return [(squares / EXAMPLES).flatten().float() for squares in total]


def tagger_fisher(size: int, estimator: Any, **settings: Any) -> list[Tensor]:
    torch.manual_seed(0)
    module = Tagger()
    batches = [Tagger.batch(range(at, min(at + size, EXAMPLES))) for at in range(0, EXAMPLES, size)]
    return estimate_fisher(module, batches, ReplicatedShards(module), estimator, **settings)


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_an_example_of_many_positions_is_their_sum(estimator: Any) -> None:
    assert_same(tagger_fisher(5, estimator), tagger_by_loop(estimator))


@pytest.mark.parametrize("estimator", ["auto", "sampled", "empirical"])
def test_batch_free_importance_of_padded_positions(estimator: Any) -> None:
    alone = tagger_fisher(1, estimator)  # without any padding
    for size in (7, 64):
        assert_same(tagger_fisher(size, estimator), alone)


def test_drawn_labels_at_many_positions_come_to_the_exact_expectation() -> None:
    torch.manual_seed(0)
    module = Tagger()
    shards = ReplicatedShards(module)
    batch = {key: value[2:5].repeat(400, 1) for key, value in Tagger.batch(range(EXAMPLES)).items()}
    exact = torch.cat(estimate_fisher(module, [{k: v[:3] for k, v in batch.items()}], shards, "exact"))
    sampled = torch.cat(estimate_fisher(module, [batch], shards, "sampled"))
    assert float((sampled - exact).norm() / exact.norm()) < 0.1


def test_auto_is_exact_for_examples_with_few_positions_and_sampled_for_the_others() -> None:
    torch.manual_seed(0)
    module, shards = (m := Tagger(6)), ReplicatedShards(m)
    batch = {"input_ids": torch.arange(14).view(2, 7), "labels": torch.zeros(2, 7).long()}
    batch["labels"][1, 2:] = -100
    parts = [{key: value[row : row + 1] for key, value in batch.items()} for row in range(2)]
    auto = estimate_fisher(module, [batch], shards, "auto")
    long = estimate_fisher(module, [IndexedBatch(parts[0], [0])], shards, "sampled")
    short = estimate_fisher(module, [IndexedBatch(parts[1], [1])], shards, "exact")
    assert_same(auto, [(a + b) / 2 for a, b in zip(long, short, strict=True)])


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
@pytest.mark.parametrize("estimator", ["auto", "empirical"])
def test_a_single_logit_is_a_yes_or_no_or_a_number(estimator: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    module, inputs = Wide(1), torch.randn(6, 4)
    p = module(inputs).sigmoid().detach()
    for labels, expected in (
        (torch.tensor([0, 1, 1, 0, 1, 0.0]).view(shape), p * (1 - p)),
        (torch.tensor([0, 1, 1, 0.3, 2, 0]).view(shape), torch.ones(6, 1)),
    ):
        ours = estimate_fisher(module, [(inputs, labels)], ReplicatedShards(module), estimator)[0].view(1, 4)
        mean = p if float(labels.max()) == 1 else module(inputs).detach()
        weights = (labels.view(6, 1) - mean).square() if estimator == "empirical" else expected
        torch.testing.assert_close(ours, weights.T @ inputs.square() / 6)


def test_drawn_numbers_come_to_the_exact_expectation() -> None:
    torch.manual_seed(0)
    module, shards = (m := Wide(1)), ReplicatedShards(m)
    batch = (torch.randn(5, 4).repeat(400, 1), torch.full((2000,), 0.3))
    exact, sampled = (estimate_fisher(module, [batch], shards, estimator) for estimator in ("exact", "sampled"))
    torch.testing.assert_close(sampled[0], exact[0], rtol=0.15, atol=0.01)


def test_whether_the_logits_are_numbers_is_decided_once() -> None:
    torch.manual_seed(0)
    module, shards = (m := Wide(1)), ReplicatedShards(m)
    inputs, labels = torch.randn(4, 4), torch.tensor([0.5, 1.0, 0.0, 1.0])
    together = estimate_fisher(module, [(inputs, labels)], shards)
    apart = estimate_fisher(module, [(inputs[i : i + 1], labels[i : i + 1]) for i in range(4)], shards)
    assert_same(apart, together)


@pytest.mark.parametrize("shape", ["similarity", "centred"])
def test_examples_that_read_each_other_are_refused(shape: str) -> None:
    torch.manual_seed(0)

    def logits(module: Any, batch: Any) -> Tensor:
        x = module(batch[0])
        return x @ x.T if shape == "similarity" else x - x.mean(0)

    module = Wide(3)
    batch = (torch.randn(4, 4), torch.arange(4) % 3)
    with pytest.raises(ValueError, match=r"of Wide for an example depend on the other examples of the batch.*logits="):
        estimate_fisher(module, [batch], ReplicatedShards(module), logits=logits)


def test_no_examples_are_refused() -> None:
    module = Wide(3)
    with pytest.raises(ValueError, match="needs examples, got none"):
        estimate_fisher(module, [], ReplicatedShards(module))


def test_examples_that_mix_are_refused() -> None:
    module = pl.LightningModule()
    module.norm = nn.BatchNorm1d(4, track_running_stats=False)
    with pytest.raises(ValueError, match=r"BatchNorm1d\(track_running_stats=False\)"):
        estimate_fisher(module, [torch.zeros(2, 4)], ReplicatedShards(module))


class HalvedShards(ReplicatedShards):
    """As under ZeRO, this rank holds only a part of every parameter."""

    sharded = True

    def __init__(self, module: pl.LightningModule) -> None:
        super().__init__(module)
        self.fragments = [
            Fragment(f.name, f.shape, f.numel // 2, f.numel - f.numel // 2) for f in self.fragments if f.numel > 1
        ]

    def values(self) -> list[Tensor]:
        whole = {name: p.detach() for name, p in self._parameters.items()}
        return [fragment.slice(whole[fragment.name]) for fragment in self.fragments]


@pytest.mark.parametrize("estimator", ["exact", "batched"])
def test_sharded_weights_get_their_part(estimator: Any) -> None:
    module = build("gpt2")
    whole = {f.name: t for f, t in zip(ReplicatedShards(module).fragments, fisher("gpt2", 5, estimator), strict=True)}
    shards = HalvedShards(module)
    batches = [module.batch(range(at, min(at + 5, EXAMPLES))) for at in range(0, EXAMPLES, 5)]
    ours = estimate_fisher(module, batches, shards, estimator)
    assert_same(ours, [fragment.slice(whole[fragment.name]) for fragment in shards.fragments])


class SequenceFirst(pl.LightningModule):
    """Layers that see the batch second, and a bias for relative positions that is computed once for all examples."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.words, self.mix, self.norm = nn.Embedding(7, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.distance, self.head = nn.Embedding(5, 1), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.norm(self.mix(self.words(ids.T)).tanh()).transpose(0, 1)
        place = torch.arange(ids.shape[1])
        bias = self.distance((place[:, None] - place).clamp(-2, 2) + 2)[..., 0]
        return self.head((bias.softmax(-1) @ hidden).sum(1))


@pytest.mark.parametrize("estimator", ["exact", "sampled", "empirical"])
def test_sharded_layers_without_the_batch_first_are_reached_one_example_at_a_time(estimator: Any) -> None:
    module, shards = SequenceFirst(), HalvedShards(SequenceFirst())
    ids = torch.randint(0, 7, (6, 3), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    batches = [(ids[at : at + 4], labels[at : at + 4]) for at in (0, 4)]
    whole = ReplicatedShards(module)
    by_autograd = estimate_fisher(module, batches, whole, estimator)
    expected = dict(zip((f.name for f in whole.fragments), by_autograd, strict=True))
    assert min(float(values.sum()) for values in expected.values()) > 0
    ours = estimate_fisher(module, batches, shards, estimator)
    assert_same(ours, [fragment.slice(expected[fragment.name]) for fragment in shards.fragments])


def test_sharded_weights_that_no_rule_reaches_are_refused_by_name() -> None:
    module = build("awkward")
    with pytest.raises(ValueError, match=r"no per-example rule reaches .*encoder\.self_attn\.in_proj_weight.* prompt"):
        estimate_fisher(module, [module.batch(range(4))], HalvedShards(module))
