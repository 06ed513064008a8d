"""Drift detection: featurisers that never learn, and detectors with a stated false-alarm rate."""

from typing import TYPE_CHECKING

from evertune.utils.lazy import face

if TYPE_CHECKING:
    from evertune.drift.classifier import ClassifierTest as ClassifierTest
    from evertune.drift.detector import Detector as Detector
    from evertune.drift.explain.attribution import Attribution as Attribution
    from evertune.drift.explain.attribution import attribute as attribute
    from evertune.drift.featurisers import Featuriser as Featuriser
    from evertune.drift.featurisers import FrozenEncoder as FrozenEncoder
    from evertune.drift.featurisers import HashedNgrams as HashedNgrams
    from evertune.drift.featurisers import SentenceEncoder as SentenceEncoder
    from evertune.drift.featurisers import check_frozen as check_frozen
    from evertune.drift.kernel_cusum import KernelCUSUM as KernelCUSUM
    from evertune.drift.labels import LabelShift as LabelShift
    from evertune.drift.lsdd import LSDD as LSDD
    from evertune.drift.marginals import MarginalKS as MarginalKS
    from evertune.drift.mmd import MMD as MMD
    from evertune.drift.performance import PerformanceEstimator as PerformanceEstimator
    from evertune.drift.scalars import ADWIN as ADWIN
    from evertune.drift.scalars import HDDM as HDDM
    from evertune.drift.scalars import PageHinkley as PageHinkley
    from evertune.drift.scanner import scan as scan

__all__, __getattr__, __dir__ = face(
    __name__,
    {
        "evertune.drift.classifier": "ClassifierTest",
        "evertune.drift.detector": "Detector",
        "evertune.drift.explain.attribution": "Attribution attribute",
        "evertune.drift.featurisers": "Featuriser FrozenEncoder HashedNgrams SentenceEncoder check_frozen",
        "evertune.drift.kernel_cusum": "KernelCUSUM",
        "evertune.drift.labels": "LabelShift",
        "evertune.drift.lsdd": "LSDD",
        "evertune.drift.marginals": "MarginalKS",
        "evertune.drift.mmd": "MMD",
        "evertune.drift.performance": "PerformanceEstimator",
        "evertune.drift.scalars": "ADWIN HDDM PageHinkley",
        "evertune.drift.scanner": "scan",
    },
)
