"""When the world has changed: featurisers that never learn, and detectors with a stated false-alarm rate."""

from evertune.drift.classifier import ClassifierTest
from evertune.drift.detector import Detector
from evertune.drift.explain.attribution import Attribution, attribute
from evertune.drift.featurisers import Featuriser, FrozenEncoder, HashedNgrams, SentenceEncoder, check_frozen
from evertune.drift.kernel_cusum import KernelCUSUM
from evertune.drift.labels import LabelShift
from evertune.drift.lsdd import LSDD
from evertune.drift.marginals import MarginalKS
from evertune.drift.mmd import MMD
from evertune.drift.performance import PerformanceEstimator
from evertune.drift.scalars import ADWIN, HDDM, PageHinkley
from evertune.drift.scan import scan

__all__ = [
    "ADWIN",
    "HDDM",
    "LSDD",
    "MMD",
    "Attribution",
    "ClassifierTest",
    "Detector",
    "Featuriser",
    "FrozenEncoder",
    "HashedNgrams",
    "KernelCUSUM",
    "LabelShift",
    "MarginalKS",
    "PageHinkley",
    "PerformanceEstimator",
    "SentenceEncoder",
    "attribute",
    "check_frozen",
    "scan",
]
