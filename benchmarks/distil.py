"""Students of a classifier: accuracy, time and size with fewer layers, neurons or heads, with and without a teacher.

    python benchmarks/distil.py [--quick]

MiniLM learns the topics of BBC News. Students with three of its six layers, with half the neurons of its feed-forward
layers, with half of its attention heads, or several of these, are trained for as many steps on the same texts: from the
labels alone, or from the teacher as well.
Times are medians over rounds in which all take turns, of the processor, tokenizer excluded.
"""

from __future__ import annotations

import argparse
import json
from statistics import median
from typing import Any

import torch
from export import MODEL, WORDS, in_torch, records, times

from evertune._lightning import pl
from evertune.callbacks.teacher_distillation import TeacherDistillation
from evertune.lightning_modules import SequenceClassificationModule
from evertune.lightning_modules.pruning import prune
from evertune.lightning_modules.students import student_of
from evertune.live.evaluation import evaluate, size_in_bytes
from evertune.streams import Experience, ExperienceDataModule
from evertune.tasks.predicting import batch_of

LENGTH, BATCH = 48, 16
MOST_LOST = 2.0  # points of accuracy that the distilled student of three layers may lose
STUDENTS: dict[str, tuple[int | None, float, float, bool]] = {  # layers, shares removed, whether it has a teacher
    "3 layers, labels alone": (3, 0.0, 0.0, False),
    "3 layers": (3, 0.0, 0.0, True),
    "half the neurons": (None, 0.5, 0.0, True),
    "half the heads": (None, 0.0, 0.5, True),
    "3 layers, half the neurons": (3, 0.5, 0.0, True),
    "3 layers, half of both": (3, 0.5, 0.5, True),
}


def fit(module: Any, rows: list[dict[str, str]], epochs: int, *callbacks: pl.Callback) -> None:
    """Train a module; each with the same order of the texts."""
    pl.seed_everything(0, verbose=False)
    experience = Experience("news", rows, classes=sorted({row["label"] for row in rows}))
    columns = {"text": "text", "label": "label", "id_column": None, "task": module.task}
    data = ExperienceDataModule(experience, module.tokenizer, batch_size=BATCH, max_length=LENGTH, **columns)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=list(callbacks), enable_model_summary=False, **quiet
    )
    trainer.fit(module, datamodule=data)


def student(teacher: Any, layers: int | None, neurons: float, heads: float, rows: list[dict[str, str]]) -> Any:
    """A smaller copy of the teacher, before it is trained."""
    made = student_of(teacher)
    if neurons or heads:
        columns = {"text": "text", "label": "label", "id_column": None, "max_length": LENGTH}
        examples: Any = made.task.dataset(rows[:256], made.tokenizer, **columns)
        starts = range(0, len(examples), BATCH)
        batches = ([examples[n] for n in range(start, min(start + BATCH, len(examples)))] for start in starts)
        prune(made, (batch_of(made.task, made, batch) for batch in batches), neurons=neurons, heads=heads)
    return made if layers is None else student_of(made, layers)


def milliseconds(modules: dict[str, Any], texts: list[str], rounds: int) -> dict[str, float]:
    """Of the processor, for a forward pass of each module."""
    tokens = next(iter(modules.values())).tokenizer(texts, padding=True, return_tensors="np")
    _, processor = times({name: in_torch(module) for name, module in modules.items()}, tokens, rounds)
    return {name: 1000 * median(seconds) for name, seconds in processor.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a third of the texts and half of the epochs")
    options = parser.parse_args()
    n_train, n_test, epochs = (200, 200, 3) if options.quick else (600, 600, 6)
    rows = records(n_train + n_test)
    train, test = rows[:n_train], [{"id": str(n), "record": row} for n, row in enumerate(rows[n_train:])]
    pl.seed_everything(0, verbose=False)
    teacher = SequenceClassificationModule(
        MODEL, classes=sorted({row["label"] for row in train}), freeze_word_embeddings=True
    )
    fit(teacher, train, max(epochs // 2, 2))
    modules: dict[str, Any] = {"teacher, 6 layers": teacher}
    for name, (layers, neurons, heads, taught) in STUDENTS.items():
        modules[name] = student(teacher, layers, neurons, heads, train)
        fit(modules[name], train, epochs, *([TeacherDistillation(teacher)] if taught else []))
    score = {
        name: evaluate(module.eval(), {"": test}, max_length=LENGTH)[""].accuracy for name, module in modules.items()
    }
    texts = [row["record"]["text"] for row in test]
    one, many = milliseconds(modules, texts[:1], 20), milliseconds(modules, texts[:32], 5)
    print(f"{'':<28}{'accuracy':>10}{'1 text, ms':>12}{'32 texts, ms':>14}{'MB':>8}")
    for name, module in modules.items():
        print(f"{name:<28}{score[name]:>10.1%}{one[name]:>12.1f}{many[name]:>14.1f}{size_in_bytes(module) / 1e6:>8.1f}")
    lost = 100 * (score["teacher, 6 layers"] - score["3 layers"])
    results = {f"{name}, accuracy": round(value, 4) for name, value in score.items()}
    results |= {f"{name}, 32 texts, ms": round(value, 1) for name, value in many.items()}
    bars = {"points lost with 3 layers": {"value": round(lost, 2), "limit": MOST_LOST, "ok": lost <= MOST_LOST}}
    size = f"{n_train} texts of {WORDS} words, {n_test} held out, {epochs} epochs, {torch.get_num_threads()} threads"
    print(json.dumps({"benchmark": "distil", "size": size, "results": results, "bars": bars}))


if __name__ == "__main__":
    main()
