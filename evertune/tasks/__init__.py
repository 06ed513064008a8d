"""Tasks: what a label, a score, a prediction and a record are for a module."""

from typing import TYPE_CHECKING

from evertune.utils.lazy import face

if TYPE_CHECKING:
    from evertune.tasks.base import Outputs as Outputs
    from evertune.tasks.base import Task as Task
    from evertune.tasks.base import task_of as task_of
    from evertune.tasks.causal_lm import CausalLMTask as CausalLMTask
    from evertune.tasks.generation import GenerationTask as GenerationTask
    from evertune.tasks.question_answering import QuestionAnsweringTask as QuestionAnsweringTask
    from evertune.tasks.regression import RegressionTask as RegressionTask
    from evertune.tasks.relation_extraction import RelationExtractionTask as RelationExtractionTask
    from evertune.tasks.seq2seq import Seq2SeqTask as Seq2SeqTask
    from evertune.tasks.sequence_classification import OrdinalTask as OrdinalTask
    from evertune.tasks.sequence_classification import SequenceClassificationTask as SequenceClassificationTask
    from evertune.tasks.text_matching import TextMatchingTask as TextMatchingTask
    from evertune.tasks.token_classification import TokenClassificationTask as TokenClassificationTask

__all__, __getattr__, __dir__ = face(
    __name__,
    {
        "evertune.tasks.base": "Outputs Task task_of",
        "evertune.tasks.question_answering": "QuestionAnsweringTask",
        "evertune.tasks.causal_lm": "CausalLMTask",
        "evertune.tasks.generation": "GenerationTask",
        "evertune.tasks.seq2seq": "Seq2SeqTask",
        "evertune.tasks.relation_extraction": "RelationExtractionTask",
        "evertune.tasks.text_matching": "TextMatchingTask",
        "evertune.tasks.sequence_classification": "OrdinalTask SequenceClassificationTask",
        "evertune.tasks.regression": "RegressionTask",
        "evertune.tasks.token_classification": "TokenClassificationTask",
    },
)
