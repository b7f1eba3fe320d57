"""What 8-bit products meet: the largest magnitude of each operand, and how much of it the cast loses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from megalm.ops.scaled_mm import Scaled

OPERANDS = ("x", "weight", "grad")
_COUNTED = 3
"""Elements; those that are not zero and become zero; those beyond the largest number."""


@dataclass
class Meter:
    """Of one product on this rank. Largest magnitudes are taken of every micro-batch, without waiting for the device; the
    rest, which reads the operands once more, only while `counting`."""

    name: str
    counting: bool = False
    wide: bool = False
    """The product is computed in the operands' own dtype, whatever the recipe says."""
    largest: Tensor | None = None
    """fp32 [3], of the operands since `begin`."""
    counts: Tensor | None = None
    """fp64 [3, 3]: of each operand what `_COUNTED` says."""

    def begin(self, *, counting: bool) -> None:
        """Forget what was seen."""
        self.counting = counting
        for seen in (self.largest, self.counts):
            if seen is not None:
                seen.zero_()

    @torch.no_grad()
    def see(self, operand: str, x: Tensor, largest: Tensor, scaled: Scaled) -> None:
        """An operand, its largest magnitude and what became of it; x [M, K] is not changed any more."""
        if x.is_meta:
            return
        if self.largest is None or self.counts is None:
            self.largest = torch.zeros(len(OPERANDS), device=x.device)
            self.counts = torch.zeros(len(OPERANDS), _COUNTED, dtype=torch.float64, device=x.device)
        place = OPERANDS.index(operand)
        self.largest[place : place + 1] = torch.maximum(self.largest[place : place + 1], largest)
        if self.counting:
            becomes = scaled.dequantize()
            top = torch.finfo(scaled.data.dtype).max
            clamped = (scaled.data.float().abs() == top) & (x.float().abs() > becomes.abs() * (1 + 2**-4))
            found = (torch.tensor(x.numel()), ((becomes == 0) & (x != 0)).sum(), clamped.sum())
            self.counts[place] += torch.stack([number.to(self.counts) for number in found])


@dataclass(frozen=True)
class Seen:
    """Of one product, over all ranks and micro-batches of a step; by operand."""

    name: str
    largest: dict[str, float]
    """Magnitude; infinite where a value was not finite."""
    zeroed: dict[str, float] = field(default_factory=dict)
    """Share of the elements that are not zero and become zero; {} where it was not counted."""
    saturated: dict[str, float] = field(default_factory=dict)
    """Share of the elements beyond the largest number."""

    @property
    def not_finite(self) -> list[str]:
        """Operands that had a value which is not finite."""
        return [operand for operand, largest in self.largest.items() if largest == float("inf")]


class Meters:
    """Of all 8-bit products of a run; this rank has those of its layers."""

    def __init__(self, names: Iterable[str], own: Sequence[Meter]) -> None:
        """names: of all ranks' products, alike on every rank."""
        self.names, self.own = sorted(names, key=_by_number), list(own)

    def begin(self, *, counting: bool) -> None:
        """A step starts."""
        for meter in self.own:
            meter.begin(counting=counting)

    def widen(self, patterns: Sequence[str]) -> list[str]:
        """Compute the products with these names in the operands' own dtype from now on; gives all that are so now."""
        for meter in self.own:
            meter.wide |= any(fnmatchcase(meter.name, pattern) for pattern in patterns)
        return [name for name in self.names if any(fnmatchcase(name, pattern) for pattern in patterns)]

    def collect(self, reduce: Callable[[Tensor, str], Tensor], device: torch.device) -> list[Seen]:
        """Collect what was seen since `begin`, of all ranks.

        reduce: over the world, in place: (values, "max" or "sum"). Comm: two of them.
        """
        places = {name: place for place, name in enumerate(self.names)}
        largest = torch.zeros(len(places), len(OPERANDS), device=device)
        counts = torch.zeros(len(places), len(OPERANDS), _COUNTED, dtype=torch.float64, device=device)
        for meter in self.own:
            if meter.largest is not None and meter.counts is not None:
                place = places[meter.name]
                largest[place] = torch.maximum(largest[place], meter.largest)
                counts[place] += meter.counts
        # What is not finite travels as infinity: a maximum may ignore NaN.
        largest = reduce(largest.nan_to_num(nan=torch.inf, posinf=torch.inf), "max")
        counts = reduce(counts, "sum")
        return [
            Seen(name, dict(zip(OPERANDS, tops, strict=True)), *_shares(numbers))
            for name, tops, numbers in zip(self.names, largest.tolist(), counts.tolist(), strict=True)
        ]


def _shares(counts: list[list[float]]) -> tuple[dict[str, float], dict[str, float]]:
    counted = {operand: numbers for operand, numbers in zip(OPERANDS, counts, strict=True) if numbers[0]}
    zeroed = {operand: numbers[1] / numbers[0] for operand, numbers in counted.items()}
    return zeroed, {operand: numbers[2] / numbers[0] for operand, numbers in counted.items()}


def _by_number(name: str) -> list[tuple[int, str]]:
    """Layers in their order, not in that of their digits."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
