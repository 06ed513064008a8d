"""When the world has changed: featurisers that never learn, and detectors with a stated false-alarm rate."""

from evertune.drift.detector import Detector
from evertune.drift.featurisers import Featuriser, FrozenEncoder, HashedNgrams, check_frozen
from evertune.drift.mmd import MMD
from evertune.drift.scan import scan

__all__ = ["MMD", "Detector", "Featuriser", "FrozenEncoder", "HashedNgrams", "check_frozen", "scan"]
