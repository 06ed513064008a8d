"""Runs a detector over a sequence of batches that is already complete."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from evertune.drift.detector import Detector
from evertune.drift.featurisers import Featuriser


def scan(batches: Iterable[Any], detector: Detector, featuriser: Featuriser) -> list[dict[str, Any]]:
    """Find where a sequence of batches changes, without training on it.

    After an alarm, the detector takes a new reference from the data that follow.

    Args:
        batches: Batches in the order in which the records arrived.
        detector: Detector to run, from its present state; pass a new one for a new sequence.
        featuriser: Function from a batch to features, ``batch -> tensor [batch, n_features]``.

    Returns:
        One entry for each test, as in ``History.drift``: ``step`` (number of records seen by then), ``score``,
        ``threshold`` and ``alarm``.

    Example:
        >>> import torch
        >>> from evertune.drift import MMD, scan
        >>> generator = torch.Generator().manual_seed(0)
        >>> batches = [torch.randn(32, 4, generator=generator) + (3 if i > 20 else 0) for i in range(24)]
        >>> points = scan(batches, MMD(arl=10_000), featuriser=lambda batch: batch)
        >>> [point["step"] for point in points if point["alarm"]]
        [704]
    """
    points, records = [], 0
    for batch in batches:
        features = featuriser(batch)
        records += len(features)
        n_tests = detector.n_tests
        detector.update(features)
        if detector.n_tests > n_tests:
            score, threshold, alarm = detector.score, detector.threshold, detector.drift_detected
            points.append({"step": records, "score": score, "threshold": threshold, "alarm": alarm})
            if alarm:
                detector.reset()
    return points
