"""What is trained: a pretrained transformer with a task head."""

from evertune.lightning_modules.heads import CosineHead, LinearHead
from evertune.lightning_modules.sequence_classification import ClassifierOutput, SequenceClassificationModule
from evertune.lightning_modules.transformer import TransformerModule

__all__ = ["ClassifierOutput", "CosineHead", "LinearHead", "SequenceClassificationModule", "TransformerModule"]
