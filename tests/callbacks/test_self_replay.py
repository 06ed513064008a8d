"""Replay without stored answers: prompts are kept, and the model that is updated answers them itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from evertune._lightning import pl
from evertune.callbacks import AGEM, Distillation, Replay, WiSEFT
from evertune.callbacks.consolidation import end_experience
from evertune.callbacks.replay.self_answers import answers_of, fault_of
from evertune.lightning_modules import CausalLMModule, Seq2SeqModule
from evertune.live.training import remembered
from evertune.memory import MemoryView
from evertune.streams import Experience, ExperienceDataModule
from tests.helpers.distributed import run_ranks
from tests.helpers.function_space import Net, Points, SaveAt, fit, quiet
from tests.helpers.generation import PLACES, dialogue, records, tiny_llama, tiny_t5

PAIR: dict[str, Any] = {"text": "prompt", "label": "answer", "id_column": None, "max_length": 24}
SAMPLED = {"max_new_tokens": 4, "do_sample": True, "temperature": 0.7}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that answers which city is red and which is blue."""
    torch.manual_seed(0)
    module = CausalLMModule(tiny_llama(tmp_path_factory.mktemp("llama")), learning_rate=0.01, dropout=0.0)
    learn(module, records("colours"), max_epochs=24)
    folder = tmp_path_factory.mktemp("trained")
    module.save_pretrained(folder)
    return str(folder)


class Seen(pl.Callback):
    """Keeps the examples of every batch, as their tokens and those that are learned."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[list[int], list[int]]]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        rows = zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
        self.batches.append([(ids[mask == 1].tolist(), labels[labels != -100].tolist()) for ids, mask, labels in rows])


def causal(folder: str, generation: dict[str, Any] | None = None) -> CausalLMModule:
    torch.manual_seed(0)
    return CausalLMModule(folder, learning_rate=1e-4, dropout=0.0, generation=generation or {"max_new_tokens": 4})


def learn(
    module: Any,
    rows: Sequence[Any],
    *callbacks: pl.Callback,
    batch_size: int = 4,
    workers: int = 0,
    ckpt_path: Path | None = None,
    columns: dict[str, Any] = PAIR,
    **settings: Any,
) -> pl.Trainer:
    data = module.task.dataset(rows, module.tokenizer, **columns)
    batches = ExperienceDataModule(
        Experience("one", data),
        batch_size=batch_size,
        collate_fn=module.task.collator(module.tokenizer),
        num_workers=workers,
    )
    trainer = quiet(*callbacks, **settings)
    trainer.fit(module, datamodule=batches, ckpt_path=ckpt_path)
    return trainer


def prompts_of(module: Any, rows: Sequence[Any]) -> list[list[int]]:
    data = module.task.dataset(rows, module.tokenizer, **PAIR)
    return [module.task.prompt_of(example)["input_ids"].tolist() for example in data]


def test_the_memory_holds_prompts_and_batches_the_answers_of_the_model_before(llama: str) -> None:
    module, replay, seen = causal(llama), Replay(8, source="self"), Seen()
    learn(module, records("colours"), replay)
    prompts = prompts_of(module, records("colours"))
    stored = [replay.memory[slot] for slot in range(len(replay.memory))]
    assert sorted(one["input_ids"].tolist() for one in stored) == sorted(prompts)
    assert all("labels" not in one for one in stored)

    questions = [row["prompt"] for row in records("colours")]
    said = dict(zip(map(tuple, prompts), module.predict(questions), strict=True))
    assert set(said.values()) == {"red", "blue"}
    learn(module, records("sizes"), replay, seen, max_epochs=2)
    replayed = [one for batch in seen.batches for one in batch[4:]]
    assert len(replayed) == 8
    end = module.tokenizer.eos_token_id
    for tokens, learned in replayed:
        assert learned[-1] == end and tokens[-len(learned) :] == learned
        prompt = tuple(tokens[: -len(learned)])
        assert module.tokenizer.decode(learned[:-1]) == said[prompt]
    assert replay.answers is not None and replay.answers.counts == {"asked": 4, "kept": 4}


def test_only_as_many_prompts_are_answered_as_an_update_can_draw(llama: str) -> None:
    module, replay = causal(llama), Replay(16, source="self", replay_ratio=0.5)
    learn(module, records("colours", 4), replay)
    assert len(replay.memory) == 16
    learn(module, records("sizes"), replay, max_epochs=3)
    assert replay.answers is not None and replay.answers.counts["asked"] == 6


def test_answers_that_cannot_be_used_are_dropped_and_reported(llama: str) -> None:
    module, replay, seen = causal(llama, {"max_new_tokens": 1}), Replay(8, source="self"), Seen()
    learn(module, records("colours"), replay)
    message = r"answered 0 of 4 prompts, .*4 were dropped \(4 unfinished\); nothing is replayed .*raise max_new_tokens"
    with pytest.warns(UserWarning, match=message):
        learn(module, records("sizes"), replay, seen)
    assert replay.answers is not None and replay.answers.counts == {"asked": 4, "kept": 0, "unfinished": 4}
    assert [len(batch) for batch in seen.batches] == [4]

    module = causal(llama)
    module.configure_model()
    long, empty = torch.full((29,), 7), torch.tensor([], dtype=torch.int64)
    answers, dropped = answers_of(quiet(), module, [{"input_ids": long}, {"input_ids": empty}], [0, 1])
    assert answers == {} and dropped == {"too long": 1, "without a prompt": 1}


@pytest.mark.parametrize(
    ("tokens", "fault"),
    [
        ([7] * 15 + [2], ""),  # a loop needs 16 tokens
        ([5] + [7] * 16 + [2], "repetitive"),
        ([*range(10, 15)] * 3 + [2], ""),
        ([3, 4, *([*range(10, 15)] * 4), 8, 2], "repetitive"),
        ([*range(10, 43)] * 4, ""),  # longer than 32 tokens is no loop
        ([*range(10, 42)] * 4, "repetitive"),
    ],
)
def test_loops(tokens: list[int], fault: str) -> None:
    assert fault_of(tokens, "text", True) == fault


def test_extra_prompts_are_answered_from_the_first_update_on(llama: str) -> None:
    module, seen = causal(llama), Seen()
    module.configure_model()
    extra = module.task.dataset(records("colours"), module.tokenizer, **PAIR)
    answers = extra.tokens["labels"] != -100
    for tokens in extra.tokens.values():
        tokens[answers] = 5  # the answers of the user's own are not read
    replay = Replay(8, source="self", extra=extra, extra_ratio=0.5)
    learn(module, records("sizes"), replay, seen)
    (batch,) = seen.batches
    said = {module.tokenizer.decode(learned[:-1]) for _, learned in batch[4:]}
    assert len(batch) == 6 and said <= {"red", "blue"} and said


@pytest.mark.parametrize("generation", [{"max_new_tokens": 4}, SAMPLED])
def test_worker_processes_see_the_same_and_the_seed_decides(llama: str, generation: dict[str, Any]) -> None:
    def answered(workers: int, seed: int) -> list[Any]:
        module, seen = causal(llama, generation), Seen()
        replay = Replay(8, source="self", seed=seed)
        learn(module, records("colours"), replay)
        learn(module, records("sizes"), replay, seen, workers=workers, max_epochs=2)
        return [sorted(map(str, batch[4:])) for batch in seen.batches]

    first = answered(0, 0)
    assert all(first)
    assert answered(2, 0) == first
    others = [answered(0, seed) for seed in (1, 2, 3)]
    assert all(other == first for other in others) == ("do_sample" not in generation)


def test_a_resumed_update_replays_the_same_answers(llama: str, tmp_path: Path) -> None:
    module, replay = causal(llama, SAMPLED), Replay(8, source="self")
    learn(module, records("colours"), replay)
    replay.save(tmp_path / "replay")
    weights = {name: value.clone() for name, value in module.state_dict().items()}

    def update(ckpt_path: Path | None) -> tuple[list[Any], dict[str, Any], Replay]:
        again, seen, other = causal(llama, SAMPLED), Seen(), Replay(8, source="self")
        again.configure_model()
        again.load_state_dict(weights)
        other.load(tmp_path / "replay")
        extra = () if ckpt_path else (SaveAt(tmp_path / "middle.ckpt"),)
        learn(again, records("sizes", 4), other, seen, *extra, ckpt_path=ckpt_path)
        return seen.batches, dict(again.state_dict()), other

    whole, end, first = update(None)
    part, resumed, second = update(tmp_path / "middle.ckpt")
    assert part == whole[2:] and any(len(batch) > 4 for batch in part)
    assert all(torch.equal(value, end[name]) for name, value in resumed.items())
    assert first.answers is not None and second.answers is not None
    assert second.answers.counts == first.answers.counts


def test_an_iterable_dataset_leaves_no_answer_either(llama: str) -> None:
    module, replay = causal(llama), Replay(8, source="self")
    data = list(module.task.dataset(records("colours"), module.tokenizer, **PAIR))

    class Arriving(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(data)

    loader: Any = DataLoader(Arriving(), batch_size=2, collate_fn=module.task.collator(module.tokenizer))
    fit(module, loader, replay, max_steps=2)
    assert len(replay.memory) == 4
    assert all("labels" not in replay.memory[slot] for slot in range(4))


def test_an_experience_that_ends_in_the_middle_of_a_fit_is_answered_there(llama: str) -> None:
    class Boundary(pl.Callback):
        splits_fit = True

        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
            if trainer.global_step == 4:
                end_experience([replay], trainer, module)
                replay.on_experience_start(trainer, module)

    module, replay, seen = causal(llama), Replay(8, source="self"), Seen()
    learn(module, records("colours", 8), replay, seen, Boundary())
    assert replay.answers is not None and replay.answers.counts == {"asked": 4, "kept": 4}
    assert [len(batch) for batch in seen.batches] == [4] * 5 + [8] * 3  # one batch was loaded ahead
    assert all(module.tokenizer.decode(learned[:-1]) in ("red", "blue") for _, learned in seen.batches[-1][4:])


def test_conversations_are_kept_up_to_the_first_answer(llama: str) -> None:
    module, replay = causal(llama), Replay(8, source="self")
    rows = [{"text": dialogue(f"what is the {place} city", "red", "and the river", "big")} for place in PLACES]
    learn(module, rows, replay, columns={**PAIR, "text": "text", "label": None, "max_length": 32})
    assert sorted(one["input_ids"].tolist() for one in map(replay.memory.__getitem__, range(4))) == sorted(
        prompts_of(module, records("colours"))
    )


def test_a_sequence_to_sequence_model_answers_its_sources(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Seq2SeqModule(tiny_t5(tmp_path), learning_rate=0.02, generation={"max_new_tokens": 6})
    replay, seen = Replay(8, source="self"), Seen()
    learn(module, records("colours"), replay, max_epochs=20)
    assert all(replay.memory[slot].keys() == {"input_ids"} for slot in range(4))
    questions = [row["prompt"] for row in records("colours")]
    said = dict(zip(map(tuple, prompts_of(module, records("colours"))), module.predict(questions), strict=True))
    learn(module, records("sizes"), replay, seen)
    assert replay.answers is not None and replay.answers.counts["kept"] == 4
    for source, learned in seen.batches[0][4:]:
        assert module.tokenizer.decode(learned[:-1]) == said[tuple(source)]


# --- what is refused, and what others make of a memory of prompts


def test_a_module_without_answers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Net writes none \(it has no write, .*\): use a CausalLMModule"):
        fit(Net(), Points([0, 1] * 4), Replay(4, source="self"))
    with pytest.raises(ValueError, match="source must be one of"):
        Replay(4, source="model")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("other", "name"),
    [(AGEM(4), "AGEM"), (WiSEFT(), "WiSEFT"), (Distillation(examples="all"), r"Distillation\(examples='all'\)")],
)
def test_methods_that_read_stored_examples_are_refused(llama: str, other: pl.Callback, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} reads the examples of the memory, .* prompts without answers"):
        learn(causal(llama), records("colours"), Replay(4, source="self"), other)


def test_plain_texts_have_no_prompts(llama: str) -> None:
    columns = {**PAIR, "text": "text", "label": None}
    with pytest.raises(ValueError, match="the first example is learned from its first token on, as a plain text"):
        learn(causal(llama), [{"text": "the river is big"}] * 4, Replay(4, source="self"), columns=columns)


def test_prompts_and_examples_do_not_mix(llama: str, tmp_path: Path) -> None:
    replay = Replay(8, source="self")
    learn(causal(llama), records("colours"), replay)
    replay.save(tmp_path / "learning" / "Replay")
    with pytest.raises(ValueError, match="filled with content='prompts', this memory has content='examples'"):
        Replay(8).load(tmp_path / "learning" / "Replay")
    assert remembered(tmp_path) is None  # nothing that a rebuild could learn
    replay = Replay(8)
    learn(causal(llama), records("colours"), replay)
    replay.save(tmp_path / "learning" / "Replay")
    assert isinstance(remembered(tmp_path), MemoryView)


def test_erased_prompts_lose_their_answers(llama: str) -> None:
    module, replay = causal(llama), Replay(8, source="self", id="id")
    for topic in ("colours", "sizes"):
        learn(module, records(topic), replay, columns={**PAIR, "id_column": "id"})
    assert replay.answers is not None and replay.answers.memory.ids
    replay.forget([f"colours {number}" for number in range(4)])
    assert replay.answers.memory.ids == []
    assert sorted(replay.memory.ids) == [f"sizes {number}" for number in range(4)]


# --- on two ranks


def two_updates(folder: str, strategy: str, devices: int) -> dict[str, Any]:
    """Two updates at one global batch: the answers, and the weights at the end."""
    module, replay = causal(folder, {"max_new_tokens": 6, **SAMPLED}), Replay(16, source="self")
    for topic in ("colours", "sizes"):
        data = module.task.dataset(records(topic, 5), module.tokenizer, **PAIR)
        loader: Any = DataLoader(
            data, batch_size=4 // devices, collate_fn=module.task.collator(module.tokenizer), shuffle=False
        )
        quiet(replay, devices=devices, strategy=strategy).fit(module, loader)
    assert replay.answers is not None
    answers = [replay.answers.memory[slot]["input_ids"].tolist() for slot in range(len(replay.answers.memory))]
    questions = [row["prompt"] for row in (*records("colours"), *records("sizes"))]
    return {"answers": answers, "counts": replay.answers.counts, "said": module.predict(questions, do_sample=False)}


@pytest.mark.parametrize(
    "strategy",
    [
        "ddp",
        pytest.param("evertune_deepspeed_stage_3", marks=pytest.mark.slow),
        pytest.param("evertune_fsdp2", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_write_the_answers_of_one_process(llama: str, strategy: str) -> None:
    one = two_updates(llama, "auto", 1)
    assert one["counts"]["kept"] > 4
    for rank in run_ranks(f"{__name__}:two_updates", 2, folder=llama, strategy=strategy, devices=2):
        assert rank == one
