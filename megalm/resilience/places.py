"""Which places of this machine have a rank: GPUs, or numbers on a machine without any. A decision without processes.

    in use      has a rank, by its place in `active`
    spare       works and has none: taken as soon as another is out
    out         its rank was lost twice, the second time before it had trained a step: what is broken stays broken

A run that is short of places goes on with those that are left, and takes one back when it has been tried and works.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

TWICE = 2
"""Losses in a row after which a place is out: most faults pass with the process, and cost only a restart."""


class Places:
    """Keeps the books of a machine's places.

    Args:
        wanted: ranks of the run.
        spares: places beside those.
        fit: the largest number of ranks that the run may have on so many places; 0: too few.
    """

    def __init__(self, wanted: int, spares: int, fit: Callable[[int], int]) -> None:
        self.wanted, self._fit = wanted, fit
        self.all = list(range(wanted + spares))
        self.active = list(range(wanted))
        """By rank."""
        self.out: list[int] = []
        self._losses: dict[int, int] = {}

    @property
    def is_short(self) -> bool:
        """True while the run has fewer ranks than it is to have."""
        return len(self.active) < self.wanted

    def lose(self, ranks: Collection[int], *, trained: bool) -> list[int]:
        """Note that these ranks were lost at once. trained: the attempt had made a step. Returns the places that are out by it.

        None is where too few would be left: then the run is not made smaller, and whether it is started again is asked elsewhere.
        """
        lost = [self.active[rank] for rank in ranks]
        if trained:
            self._losses.clear()
        for place in lost:
            self._losses[place] = self._losses.get(place, 0) + 1
        broken = [place for place in lost if self._losses[place] >= TWICE and not trained]
        if not broken or not self._fit(len(self.all) - len(self.out) - len(broken)):
            return []
        self.out += broken
        self._choose()
        return broken

    def take_back(self, places: Collection[int]) -> bool:
        """These work again. True where the run gets more ranks by it."""
        before = len(self.active)
        self.out = [place for place in self.out if place not in places]
        for place in places:
            self._losses.pop(place, None)
        if self._fit(len(self.all) - len(self.out)) <= before:
            return False
        self._choose()
        return True

    def _choose(self) -> None:
        """Choose a rank on each place that works, the first ones first; the others are spares."""
        working = [place for place in self.all if place not in self.out]
        kept = [place for place in self.active if place in working]
        more = [place for place in working if place not in kept]
        self.active = sorted((kept + more)[: self._fit(len(working))])
