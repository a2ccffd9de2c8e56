"""The hyperparameters of meta-training that no validation inside it chooses: a search may, on validation users."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import Tensor, tensor


@dataclass(frozen=True)
class Recipe:
    """Defaults were chosen on MovieLens-100K's `tune` phase.

    Attributes:
        cosine_shrink, next20_shrink, next8_shrink: events of doubt in a similarity, added to its denominator.
        ease_ridge: penalty of the item-item regression, in users.
        cosine_decay, next20_decay, next8_decay, ease_decay: what a positive counts after each later event.
        als_ridge, als_alpha: penalty and confidence of the factors that the inner step moves in.
        text_shrinkage: events of trust in what an item's text predicts.
        half_life: events of a partition after which a position-popularity count has halved; another one is taken
            where validation users surely gain by it.

    """

    cosine_shrink: float = 5.0
    next20_shrink: float = 20.0
    next8_shrink: float = 5.0
    ease_ridge: float = 1000.0
    cosine_decay: float = 0.9
    next20_decay: float = 0.9
    next8_decay: float = 0.7
    ease_decay: float = 0.9
    als_ridge: float = 20.0
    als_alpha: float = 3.0
    text_shrinkage: float = 1.0
    half_life: float = 4000.0

    def __post_init__(self) -> None:
        """Refuse values that mean nothing (ValueError names the first)."""
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} = {value} is not within [{low:g}, {high:g}]")

    @property
    def decays(self) -> Tensor:
        """Decay of each part, in the order of `item_fitting.PARTS`: [P]."""
        return tensor([self.cosine_decay, self.next20_decay, self.next8_decay, self.ease_decay])

    @property
    def pseudo_events(self) -> Tensor:
        """Shrinkages of the counted parts, in the order of `item_fitting.PARTS`: [C]."""
        return tensor([self.cosine_shrink, self.next20_shrink, self.next8_shrink])

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Recipe:
        """From plain values; those that are not given keep their defaults. Raises ValueError for an unknown name."""
        known = {field.name for field in fields(cls)}
        for name, value in values.items():
            if name not in known:
                raise ValueError(f"unknown entry {name!r}; known: {', '.join(sorted(known))}")
            if type(value) not in (int, float):
                raise ValueError(f"{name} must be a number")
        return cls(**{name: float(value) for name, value in values.items()})

    def values(self) -> dict[str, float]:
        """Plain values by name."""
        return asdict(self)


# What a value may be; a search draws from the same ranges, shrinkages and penalties on a logarithmic scale.
RANGES: dict[str, tuple[float, float]] = {
    "cosine_shrink": (0.1, 500.0),
    "next20_shrink": (0.1, 500.0),
    "next8_shrink": (0.1, 500.0),
    "ease_ridge": (10.0, 20_000.0),
    "cosine_decay": (0.5, 1.0),
    "next20_decay": (0.5, 1.0),
    "next8_decay": (0.5, 1.0),
    "ease_decay": (0.5, 1.0),
    "als_ridge": (0.1, 500.0),
    "als_alpha": (0.5, 50.0),
    "text_shrinkage": (0.01, 100.0),
    "half_life": (200.0, 1_000_000.0),
}
DEFAULT = Recipe()
