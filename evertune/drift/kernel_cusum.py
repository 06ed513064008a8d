"""A detector that tests windows of several lengths at once, every few records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from evertune.drift.calibration import resample, threshold_of_paths
from evertune.drift.mmd import fourier_features, frequencies_for
from evertune.drift.sums import SumDetector
from evertune.drift.windows import _MIN_WINDOWS, _REFERENCES, reference_needed

_ALARMS = 100  # alarms expected in all resampled streams together: enough for a rate that is accurate to 10%
_MAX_STRIDES = 1_000_000  # resampled strides; a rate that leaves fewer than a tenth of the alarms is refused
_POOL = 2_048  # resampled strides from which the streams are composed
_PART = 8_192  # strides of streams that are scored at once
_MOMENTS = 64  # moments of a stream at which its largest score so far is recorded
_LONGEST_WINDOWS = 8  # minimum length of a resampled stream in longest windows, so that its start matters little
_EXACT = 4_096  # in a longer reference, a record meets itself too seldom to matter
_GROUPS = 4  # groups of resampled references
_NOTHING = 1e-6  # scores below this are rounding errors of a constant reference


class KernelCUSUM(SumDetector):
    """Detects sharp changes at once and faint ones in time, at a stated rate of false alarms.

    After each ``stride`` records, windows of several lengths that end there are compared with the reference. Each is
    scored by its squared maximum mean discrepancy times its length, standardised by the mean and standard deviation of
    this value while nothing changes; the score of the detector is the largest over the lengths (the online kernel CUSUM
    of Wei & Xie 2022; with ``kernel="linear"``, the window-limited likelihood ratio of Lai 1995 for a shift of unknown
    size). Short windows detect large changes within a few records, long ones gather the evidence for small changes.
    Only sums of the feature map are kept: one for each stride of the longest window.

    False alarms occur once in ``arl`` records, on average over references and streams: whole streams are resampled and
    scored against resampled references, up to their first alarm (see
    :func:`~evertune.drift.calibration.threshold_of_paths`). There is no p-value, as neighbouring windows overlap.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> detector = KernelCUSUM(arl=2_000, reference_size=256, kernel="linear")
        >>> detector.update(torch.randn(1_000, generator=generator)[:, None])
        >>> detector.armed, detector.drift_detected
        (True, False)
        >>> for record in torch.randn(400, generator=generator) + 1.0:  # the mean moves by one sigma
        ...     detector.update(record)
        ...     if detector.drift_detected:
        ...         break
        >>> detector.detected_at
        1016

    Args:
        arl: Average run length: the mean number of records from arming to a false alarm. Default: 10,000.
        reference_size: Number of records in the reference. Default: 512.
        window_sizes: Lengths of the windows in records, multiples of ``stride`` and at least twice ``block_size``.
            Default: 2, 4, 8, ... strides (or blocks, if those are larger), up to a quarter of the reference, whose own
            accuracy limits that of longer windows.
        stride: Number of records from one test to the next. Default: 8.
        block_size: Number of consecutive records that are resampled together: several times the stretch over which they
            are correlated. Must divide ``stride`` or be a multiple of it, and divide ``reference_size``. Default: 1,
            for independent records.
        kernel: ``"gaussian"`` detects any change of the distribution. ``"linear"`` detects only changes of the mean,
            but these better if there are few features; each feature is divided by its standard deviation in the
            reference.
        n_frequencies: Number of random frequencies of the Gaussian kernel; each gives two features, a cosine and a
            sine. Default: 128.
        seed: Seed of the frequencies and the resampling.

    Raises:
        ValueError: If a setting is out of its range, or the reference is too small for the windows or the false-alarm
            rate (the message names the size needed).
    """

    _kept = (*SumDetector._kept, "_ring", "_map_by", "_usual")

    def __init__(
        self,
        arl: float = 10_000,
        *,
        reference_size: int = 512,
        window_sizes: Sequence[int] | None = None,
        stride: int = 8,
        block_size: int = 1,
        kernel: Literal["gaussian", "linear"] = "gaussian",
        n_frequencies: int = 128,
        seed: int = 0,
    ) -> None:
        for name, value in {"stride": stride, "block_size": block_size, "n_frequencies": n_frequencies}.items():
            if value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        if kernel not in ("gaussian", "linear"):
            raise ValueError(f"kernel must be 'gaussian' or 'linear', got {kernel!r}")
        if stride % block_size and block_size % stride:
            raise ValueError(f"block_size must divide stride={stride} or be a multiple of it, got {block_size}")
        shortest = 2 * max(stride, block_size)
        if window_sizes is None:
            longest = max(shortest, reference_size // _MIN_WINDOWS)
            window_sizes = [shortest << power for power in range((longest // shortest).bit_length())]
        if not window_sizes or any(size < 1 or size % stride for size in window_sizes):
            raise ValueError(f"window_sizes must be multiples of stride={stride}, got {list(window_sizes)}")
        if block_size > 1 and min(window_sizes) < 2 * block_size:
            raise ValueError(
                f"window_sizes must be at least twice block_size={block_size}, got {min(window_sizes)}: resampled "
                "windows inside a block are those of the reference over again, too few to tell a small rate from"
            )
        self.window_sizes = tuple(sorted(set(window_sizes)))
        self.stride, self.kernel, self.n_frequencies = stride, kernel, n_frequencies
        super().__init__(stride, arl, reference_size, block_size, seed)
        most = stride * _MAX_STRIDES * 10 // _ALARMS
        if not stride < arl <= most:
            raise ValueError(f"arl must be above stride={stride} and at most {most}, got {arl:g}")
        longest = self.window_sizes[-1]
        needed = reference_needed(stride / self.arl, max(longest, block_size), block_size)
        if reference_size < needed:
            raise ValueError(
                f"a reference of {reference_size} records is too small for arl={arl:g} with windows of up to {longest} "
                f"and block_size={block_size}: reference_size must be at least {needed}"
            )

    def _clear(self) -> None:
        super()._clear()
        self._ring = torch.empty(0)  # centred sums of the last strides: [longest window / stride, n_map]
        self._map_by = torch.empty(0)  # frequencies [n_features, n_frequencies], or the factor of each feature
        self._usual = torch.empty(2, 0)  # mean and standard deviation of the distances of each length, [2, lengths]

    def _fit(self, reference: Tensor, generator: torch.Generator) -> None:
        if self.kernel == "linear":
            spread = reference.double().std(0)
            self._map_by = 1 / torch.where(spread > 0, spread, 1.0)
        else:
            self._map_by = frequencies_for(reference, self.n_frequencies, generator)

    def _map(self, records: Tensor) -> Tensor:
        if self.kernel == "linear":
            return records.double() * self._map_by
        return fourier_features(records, self._map_by)

    def _arm(self, reference: Tensor, generator: torch.Generator) -> None:
        mapped = self._mapped(reference, generator)
        self._ring = self._window[None][:0]
        centred = (mapped - self._mean).float()
        wider = [_cut_off(centred, self.block_size, size) for size in self.window_sizes]
        references = resample(len(centred), (_GROUPS * _REFERENCES, len(centred)), self.block_size, generator)
        together = max(self.block_size // self.stride, 1)  # strides that come from one block
        shape = (_POOL // together, together * self.stride)
        pool = resample(len(centred), shape, self.block_size, generator).view(-1, self.stride)
        own, products, crossed, far = _products(centred, pool, references, self.block_size, together)

        step = math.ceil(max(self.arl, _LONGEST_WINDOWS * self.window_sizes[-1]) / self.stride / _MOMENTS)
        length = step * _MOMENTS
        n_paths = math.ceil(min(math.ceil(_ALARMS * self.arl / self.stride), _MAX_STRIDES) / length / _GROUPS) * _GROUPS
        # Streams are composed of strides from a pool, so that the products of the pool's strides serve all of them.
        starts = torch.randint(shape[0], (n_paths, math.ceil(length / together), 1), generator=generator)
        streams = (starts * together + torch.arange(together)).flatten(1)[:, :length]
        largest = []
        for group, part in enumerate(streams.tensor_split(_GROUPS)):  # each group has its own streams and references
            columns = slice(group * _REFERENCES, (group + 1) * _REFERENCES)
            scores = [
                self._best(few, own, products, crossed[:, columns], far[columns], wider)
                .unflatten(1, (_MOMENTS, step))
                .amax(2)
                for few in part.split(max(1, _PART // length))
            ]
            largest.append(torch.cat(scores).cummax(1).values.transpose(0, 1))
        times = torch.arange(1, _MOMENTS + 1) * step * self.stride
        self.threshold = max(threshold_of_paths(torch.cat(largest, 2), times, self.arl), _NOTHING)

    def _best(
        self, streams: Tensor, own: Tensor, products: Tensor, crossed: Tensor, far: Tensor, wider: list[float]
    ) -> Tensor:
        """The score after each stride of resampled streams, against each of the resampled references.

        The squared sum of a window is computed from that of the window which ended a stride earlier and was a stride
        shorter, plus the square of its newest stride and twice the products of that stride with the others. The cost
        therefore does not depend on the size of the feature map.

        Args:
            streams: Positions in the pool of the strides of each stream, ``[streams, length]``.
            own: Squared sums of the pool's strides, ``[strides]``.
            products: Products of the pool's strides with each other, ``[strides, strides]``.
            crossed: Products of the pool's strides with the references' means, ``[strides, references]``.
            far: Squared means of the references, ``[references]``.
            wider: Correction factor of the distances for each window length.

        Returns:
            Scores ``[streams, length, references]``; minus infinity until the shortest window is full.
        """
        totals = pad(crossed[streams].cumsum(1), (0, 0, 1, 0))
        best = torch.full((*streams.shape, len(far)), -math.inf)
        added = own[streams]
        squares = added.clone()
        first = not self._usual.numel()
        for n in range(1, self.window_sizes[-1] // self.stride + 1):
            if n > 1:
                added[:, n - 1 :] += 2 * products[streams[:, n - 1 :], streams[:, : 1 - n]]
                squares = pad(squares[:, :-1], (1, 0)) + added
            size = n * self.stride
            if size in self.window_sizes:
                distance = (totals[:, n:] - totals[:, :-n]).mul_(-2).add_((squares[:, n - 1 :] / size)[..., None])
                distance.add_(far * size).mul_(wider[self.window_sizes.index(size)])
                if first:
                    usual = torch.tensor([[distance.mean()], [distance.std()]], dtype=torch.float64)
                    self._usual = torch.cat([self._usual, usual], 1)
                mean, spread = self._usual[:, self.window_sizes.index(size)].tolist()
                distance.sub_(mean).div_(max(spread, _NOTHING**2))
                torch.maximum(best[:, n - 1 :], distance, out=best[:, n - 1 :])
        return best

    def _take(self, sums: Tensor, count: int) -> None:
        sums = torch.cat([(sums[0] + self._window)[None], sums[1:], torch.zeros_like(sums[:1])])
        complete, self._filled = divmod(self._filled + count, self.stride)
        self._window = sums[complete].clone()
        seen = self.n_seen + count
        if complete:
            # Sums are centred by the reference's mean, so that the squared sum of a window is its distance from it.
            strides = torch.cat([self._ring, sums[:complete] - self.stride * self._mean])
            self._ring = strides[-self.window_sizes[-1] // self.stride :].clone()
            for i, score in enumerate(self._scores(strides)[-complete:].tolist()):
                if score > -math.inf:
                    self.n_seen = seen - self._filled - (complete - 1 - i) * self.stride
                    self._test(score, math.nan)
        self.n_seen = seen

    def _scores(self, strides: Tensor) -> Tensor:
        """The score after each stride; minus infinity until the shortest window is full."""
        totals = pad(strides.cumsum(0), (0, 0, 1, 0))
        best = torch.full((len(strides),), -math.inf, dtype=torch.float64)
        for size, (mean, spread) in zip(self.window_sizes, self._usual.T.tolist(), strict=True):
            n = size // self.stride
            distance = (totals[n:] - totals[:-n]).square().sum(1) / size
            best[n - 1 :] = best[n - 1 :].maximum((distance - mean) / max(spread, _NOTHING**2))
        return best


def _products(
    centred: Tensor, pool: Tensor, references: Tensor, block_size: int, together: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Squares of resampled strides, their products with each other and with resampled references, and the latter's
    squares.

    The same record is drawn repeatedly, and its product with itself is far larger than with any other record, as is
    that with its neighbours in a block: distances would vary more than those of new records. Such products therefore
    count as zero, except within a block.

    Args:
        centred: The centred reference in the feature map, ``[records, n_map]``.
        pool: Positions in the reference of the records of each stride, ``[strides, stride]``.
        references: Positions of the records of each resampled reference, ``[references, records]``.
        block_size: Number of consecutive records that are drawn together.
        together: Number of strides that come from one block.
    """
    n = len(centred)
    sums, means = embedding_bag(pool, centred, mode="sum"), embedding_bag(references, centred, mode="mean")
    products, crossed, far = sums @ sums.T, sums @ means.T, means.square().sum(1)
    own = products.diagonal().clone()
    if n <= _EXACT:
        records = centred @ centred.T
        apart = (torch.arange(n)[:, None] - torch.arange(n)).abs()
        near = records * (torch.minimum(apart, n - apart) < block_size)
        usual = near.sum() / n**2
        # ``usual`` restores the mean that is lost by setting the products to zero.
        records += usual - near
        of_records = embedding_bag(pool, records, mode="sum").T.contiguous()  # [n, strides]
        crossed = embedding_bag(references, of_records, mode="mean").T.contiguous()
        same = torch.arange(len(pool)) // together
        apart_products = embedding_bag(pool, of_records, mode="sum")
        products = torch.where(same[:, None] == same, products, apart_products)
        if together == 1:  # a stride consists of blocks: the correction also applies to records of different blocks
            blocks = embedding_bag(pool.reshape(-1, block_size), centred, mode="sum").square().sum(1)
            own = blocks.view(len(pool), -1).sum(1) + apart_products.diagonal() - usual * pool.shape[1] * block_size
    return own, products.fill_diagonal_(0), crossed, far


def _cut_off(centred: Tensor, block_size: int, window_size: int) -> float:
    """How much larger squared sums over a window of a real stream are than those over windows of resampled blocks.

    Blocks miss the correlation across their ends, which is assumed to decay as in an autoregression of order one (a
    share of ``2 rho / (1 - rho^2) / block_size`` of the variance), and the variance that subtracting the reference's
    own mean removes. The largest sums are those of windows with as few block ends as possible.
    """
    if block_size == 1:
        return 1.0
    squares = centred.square().sum().clamp(min=_NOTHING)
    rho = min(max(((centred[1:] * centred[:-1]).sum() / squares).item(), 0.0), 0.95)
    ends = min(2 * rho / (1 - rho**2) / block_size, 0.5) * max(0.0, 1 - block_size / window_size)
    return 1 / (1 - ends - block_size / len(centred))
