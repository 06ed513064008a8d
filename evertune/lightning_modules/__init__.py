"""Ready-made LightningModules: a pretrained transformer for each kind of task."""

from typing import TYPE_CHECKING

from evertune.utils.lazy import face

if TYPE_CHECKING:
    from evertune.lightning_modules.analytic import AnalyticHead as AnalyticHead
    from evertune.lightning_modules.analytic_classification import (
        AnalyticClassificationModule as AnalyticClassificationModule,
    )
    from evertune.lightning_modules.causal_lm import CausalLMModule as CausalLMModule
    from evertune.lightning_modules.heads import CosineHead as CosineHead
    from evertune.lightning_modules.heads import LinearHead as LinearHead
    from evertune.lightning_modules.heads import OrdinalHead as OrdinalHead
    from evertune.lightning_modules.item_index import ItemIndex as ItemIndex
    from evertune.lightning_modules.ordinal_classification import (
        OrdinalClassificationModule as OrdinalClassificationModule,
    )
    from evertune.lightning_modules.question_answering import QuestionAnsweringModule as QuestionAnsweringModule
    from evertune.lightning_modules.question_answering import SpanOutput as SpanOutput
    from evertune.lightning_modules.relation_extraction import RelationExtractionModule as RelationExtractionModule
    from evertune.lightning_modules.seq2seq import Seq2SeqModule as Seq2SeqModule
    from evertune.lightning_modules.sequence_classification import ClassifierOutput as ClassifierOutput
    from evertune.lightning_modules.sequence_classification import (
        SequenceClassificationModule as SequenceClassificationModule,
    )
    from evertune.lightning_modules.sequence_regression import RegressionOutput as RegressionOutput
    from evertune.lightning_modules.sequence_regression import SequenceRegressionModule as SequenceRegressionModule
    from evertune.lightning_modules.text_matching import TextMatchingModule as TextMatchingModule
    from evertune.lightning_modules.token_classification import TokenClassificationModule as TokenClassificationModule
    from evertune.lightning_modules.transformer import TransformerModule as TransformerModule
    from evertune.lightning_modules.zero_shot import ZeroShotClassificationModule as ZeroShotClassificationModule

__all__, __getattr__, __dir__ = face(
    __name__,
    {
        "evertune.lightning_modules.analytic": "AnalyticHead",
        "evertune.lightning_modules.analytic_classification": "AnalyticClassificationModule",
        "evertune.lightning_modules.causal_lm": "CausalLMModule",
        "evertune.lightning_modules.heads": "CosineHead LinearHead OrdinalHead",
        "evertune.lightning_modules.ordinal_classification": "OrdinalClassificationModule",
        "evertune.lightning_modules.question_answering": "QuestionAnsweringModule SpanOutput",
        "evertune.lightning_modules.seq2seq": "Seq2SeqModule",
        "evertune.lightning_modules.relation_extraction": "RelationExtractionModule",
        "evertune.lightning_modules.sequence_classification": "ClassifierOutput SequenceClassificationModule",
        "evertune.lightning_modules.item_index": "ItemIndex",
        "evertune.lightning_modules.text_matching": "TextMatchingModule",
        "evertune.lightning_modules.sequence_regression": "RegressionOutput SequenceRegressionModule",
        "evertune.lightning_modules.token_classification": "TokenClassificationModule",
        "evertune.lightning_modules.transformer": "TransformerModule",
        "evertune.lightning_modules.zero_shot": "ZeroShotClassificationModule",
    },
)
