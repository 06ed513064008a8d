"""Methods that learn without forgetting, as Lightning callbacks: one method per file."""

from typing import TYPE_CHECKING

from evertune.utils.lazy import face

if TYPE_CHECKING:
    from evertune.callbacks.adversarial_training import AdversarialTraining as AdversarialTraining
    from evertune.callbacks.agem import AGEM as AGEM
    from evertune.callbacks.augmentation import Augmentation as Augmentation
    from evertune.callbacks.averaging import EMA as EMA
    from evertune.callbacks.averaging import VersionAveraging as VersionAveraging
    from evertune.callbacks.base import ContinualCallback as ContinualCallback
    from evertune.callbacks.dark_replay import DarkReplay as DarkReplay
    from evertune.callbacks.distillation import Distillation as Distillation
    from evertune.callbacks.drift_trigger import DriftTrigger as DriftTrigger
    from evertune.callbacks.erace import ERACE as ERACE
    from evertune.callbacks.ewc import EWC as EWC
    from evertune.callbacks.gem import GEM as GEM
    from evertune.callbacks.imprinting import Imprinting as Imprinting
    from evertune.callbacks.inf_lora import InfLoRA as InfLoRA
    from evertune.callbacks.l2sp import L2SP as L2SP
    from evertune.callbacks.logit_adjustment import LogitAdjustment as LogitAdjustment
    from evertune.callbacks.mas import MAS as MAS
    from evertune.callbacks.mention_replacement import MentionReplacement as MentionReplacement
    from evertune.callbacks.merged_adapters import MergedAdapters as MergedAdapters
    from evertune.callbacks.mir import MIR as MIR
    from evertune.callbacks.orthogonal_lora import OrthogonalLoRA as OrthogonalLoRA
    from evertune.callbacks.osft import OSFT as OSFT
    from evertune.callbacks.pseudo_labels import PseudoLabels as PseudoLabels
    from evertune.callbacks.rdrop import RDrop as RDrop
    from evertune.callbacks.replay.callback import Replay as Replay
    from evertune.callbacks.seq import SEQ as SEQ
    from evertune.callbacks.shrink_perturb import ShrinkPerturb as ShrinkPerturb
    from evertune.callbacks.source_losses import SourceLosses as SourceLosses
    from evertune.callbacks.synaptic_intelligence import SynapticIntelligence as SynapticIntelligence
    from evertune.callbacks.update_length import UpdateLength as UpdateLength
    from evertune.callbacks.weight_method import WeightMethod as WeightMethod
    from evertune.callbacks.wise_ft import WiSEFT as WiSEFT
    from evertune.training.checkpoint import UpdateCheckpoint as UpdateCheckpoint
    from evertune.training.evaluation import ContinualEvaluation as ContinualEvaluation
    from evertune.training.fastest import Fastest as Fastest
    from evertune.training.heartbeat import Heartbeat as Heartbeat
    from evertune.training.preemption import Preempted as Preempted
    from evertune.training.preemption import Preemption as Preemption

__all__, __getattr__, __dir__ = face(
    __name__,
    {
        "evertune.callbacks.adversarial_training": "AdversarialTraining",
        "evertune.callbacks.agem": "AGEM",
        "evertune.callbacks.augmentation": "Augmentation",
        "evertune.callbacks.averaging": "EMA VersionAveraging",
        "evertune.callbacks.base": "ContinualCallback",
        "evertune.callbacks.dark_replay": "DarkReplay",
        "evertune.callbacks.distillation": "Distillation",
        "evertune.callbacks.drift_trigger": "DriftTrigger",
        "evertune.callbacks.erace": "ERACE",
        "evertune.callbacks.ewc": "EWC",
        "evertune.callbacks.gem": "GEM",
        "evertune.callbacks.imprinting": "Imprinting",
        "evertune.callbacks.inf_lora": "InfLoRA",
        "evertune.callbacks.l2sp": "L2SP",
        "evertune.callbacks.logit_adjustment": "LogitAdjustment",
        "evertune.callbacks.mas": "MAS",
        "evertune.callbacks.mir": "MIR",
        "evertune.callbacks.osft": "OSFT",
        "evertune.callbacks.mention_replacement": "MentionReplacement",
        "evertune.callbacks.merged_adapters": "MergedAdapters",
        "evertune.callbacks.orthogonal_lora": "OrthogonalLoRA",
        "evertune.callbacks.rdrop": "RDrop",
        "evertune.callbacks.pseudo_labels": "PseudoLabels",
        "evertune.callbacks.replay.callback": "Replay",
        "evertune.callbacks.seq": "SEQ",
        "evertune.callbacks.shrink_perturb": "ShrinkPerturb",
        "evertune.callbacks.source_losses": "SourceLosses",
        "evertune.callbacks.synaptic_intelligence": "SynapticIntelligence",
        "evertune.callbacks.update_length": "UpdateLength",
        "evertune.callbacks.weight_method": "WeightMethod",
        "evertune.callbacks.wise_ft": "WiSEFT",
        "evertune.training.checkpoint": "UpdateCheckpoint",
        "evertune.training.evaluation": "ContinualEvaluation",
        "evertune.training.fastest": "Fastest",
        "evertune.training.heartbeat": "Heartbeat",
        "evertune.training.preemption": "Preempted Preemption",
    },
)
