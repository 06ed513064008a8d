"""An endless sequence of draws that any number of processes share without talking to each other."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


class Draws:
    """The sequence goes through all numbers below ``size`` in a random order, then again in another order, and so on.

    It depends only on the seed, the update and the position, so ranks that share the positions together draw the same
    as a single process. The cost is that of the draw itself, plus one shuffle per pass.

    Args:
        size: Number of things to draw from.
        seed: Seed of the order.
        name: Number of the sequence: those of two names have different orders.

    Example:
        >>> draws = Draws(3, seed=0)
        >>> draws.at(np.arange(6), update=1).tolist()
        [1, 2, 0, 2, 1, 0]
    """

    def __init__(self, size: int, seed: int, name: tuple[int, ...] = ()) -> None:
        self.size, self.seed, self.name = size, seed, name
        self._pass: tuple[tuple[int, int], Indices] | None = None

    def at(self, positions: NDArray[np.int64], update: int) -> Indices:
        """The numbers at ``positions`` in the sequence of one update; none if there are none to draw from."""
        if self.size == 0:
            return np.empty(0, dtype=np.int64)
        passes, places = np.divmod(np.asarray(positions, dtype=np.int64), self.size)
        drawn = np.empty(len(places), dtype=np.int64)
        for number in np.unique(passes).tolist():
            here = passes == number
            drawn[here] = self._order(update, number)[places[here]]
        return drawn

    def generator(self, *numbers: int) -> np.random.Generator:
        """A counter-based generator with its own seed: any position can be reached without drawing those before it."""
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, *numbers, *self.name])))

    def _order(self, update: int, number: int) -> Indices:
        if self._pass is None or self._pass[0] != (update, number):
            self._pass = (update, number), self.generator(update, number).permutation(self.size)
        return self._pass[1]
