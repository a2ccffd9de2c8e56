"""Streams with a known change: coins, and the errors of a classifier on River's generators.

Concepts draw from pools of a generator's events. The classifier is fitted on the first concept before the stream, and
again wherever a loop says so; its 0/1 error is the loss, a coin of the same price the loss of the start.

Letters: E events, F features, P events of a pool.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from river.datasets import synth

from pipeline.drift import Observations

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

START_MS = 1_704_067_200_000
DAY_MS = 86_400_000
EVENTS_PER_DAY = 5_000
NUM_USERS = 2_000
NUM_FIT = 2_000  # events that a classifier is fitted on
POOL = 12_000
GENERATORS = ("SEA", "Agrawal", "LED", "Hyperplane")
INJECTED = (np.nan, np.inf, -np.inf, 1e308)


class BinnedBayes:
    """Naive Bayes over eight quantile bins of each feature: fitted and applied in a few numpy calls."""

    def __init__(self, features: Floats, classes: Ints) -> None:
        inner = np.linspace(0, 1, 9)[1:-1]
        self._edges = [np.unique(np.quantile(column, inner)) for column in features.T]
        num = int(classes.max()) + 1
        self._prior = np.log(np.bincount(classes, minlength=num) + 1.0)
        self._tables = []
        for column, edges in zip(features.T, self._edges, strict=True):
            counts = np.ones((len(edges) + 1, num))
            np.add.at(counts, (np.digitize(column, edges, right=True), classes), 1.0)
            self._tables.append(np.log(counts / counts.sum(0)))

    def errors(self, features: Floats, classes: Ints) -> Floats:
        """0/1 [E]."""
        scores = np.tile(self._prior, (len(features), 1))
        for column, edges, table in zip(features.T, self._edges, self._tables, strict=True):
            scores += table[np.digitize(column, edges, right=True)]
        wrong: Floats = (scores.argmax(1) != classes).astype(np.float64)
        return wrong


@dataclass(frozen=True)
class Pool:
    """Events of one concept: features [P, F] and classes [P]."""

    features: Floats
    classes: Ints


@cache
def pool(generator: str, concept: int) -> Pool:
    """One of the two concepts of a generator, with noise that leaves an error of about a tenth (LED: a quarter)."""
    made: dict[str, Any] = {
        "SEA": lambda: synth.SEA(variant=(3, 2)[concept], seed=concept, noise=0.07),
        "Agrawal": lambda: synth.Agrawal(classification_function=(0, 2)[concept], seed=concept),
        "LED": lambda: synth.LED(seed=concept, noise_percentage=0.1),
        "Hyperplane": lambda: synth.Hyperplane(seed=1 + concept, n_features=6),
    }
    found = as_pool(iter(made[generator]()), POOL)
    if generator == "LED" and concept:  # segments change places
        return Pool(found.features[:, [3, 1, 2, 0, 5, 4, 6]], found.classes)
    return found


def as_pool(rows: Iterator[tuple[dict[Any, Any], Any]], num: int) -> Pool:
    """The next `num` events."""
    taken = list(islice(rows, num))
    features = np.array([list(map(float, row.values())) for row, _ in taken])
    return Pool(features, np.array([int(label) for _, label in taken]))


@cache
def error_pool(generator: str, fitted_on: int, concept: int) -> Floats:
    """Errors [P] on one concept of the classifier that was fitted on another (or the same)."""
    fit, judged = pool(generator, fitted_on), pool(generator, concept)
    half = POOL // 2
    model = BinnedBayes(fit.features[:half], fit.classes[:half])
    errors = model.errors(judged.features, judged.classes)
    return errors[half:] if fitted_on == concept else errors


def errors_of(generator: str, concepts: Ints, rng: np.random.Generator) -> Floats:
    """Errors [E] of a classifier that knows concept 0, given each event's concept [E]."""
    drawn = [error_pool(generator, 0, concept) for concept in (0, 1)]
    places = [rng.integers(0, len(errors), len(concepts)) for errors in drawn]
    return np.where(concepts == 0, drawn[0][places[0]], drawn[1][places[1]])


def rotating(seed: int, before: int, after: int) -> Floats:
    """Errors on a hyperplane that stands still for `before` events and then turns steadily."""
    plane = synth.Hyperplane(seed=100 + seed, n_features=6, n_drift_features=3, sigma=0.0)
    rows = iter(plane)
    fit = as_pool(rows, NUM_FIT)
    still = as_pool(rows, before)
    plane.mag_change = 0.0005
    turning = as_pool(rows, after)
    model = BinnedBayes(fit.features, fit.classes)
    return np.concatenate([model.errors(part.features, part.classes) for part in (still, turning)])


def coins(rates: Floats, rng: np.random.Generator) -> Floats:
    """0/1 losses [E] with these probabilities."""
    return (rng.random(len(rates)) < rates).astype(np.float64)


def daily(rates: Floats, amplitude: float = 0.5) -> Floats:
    """Rates with a daily cycle."""
    return rates * (1 + amplitude * np.sin(2 * np.pi * np.arange(len(rates)) / EVENTS_PER_DAY))


def observed(loss: Floats, rng: np.random.Generator, *, first: int = 0, poison: float = 0.0) -> Observations:
    """Losses as a monitor reads them, by random users, segments and one scene; a share of them poisoned."""
    num = len(loss)
    start = coins(np.full(num, loss.mean() if num else 0.0), rng)
    if poison:
        hit = np.flatnonzero(rng.random(num) < poison)
        loss, start = loss.copy(), start.copy()
        loss[hit] = rng.choice(INJECTED, len(hit))
        start[hit[::2]] = np.nan
    at_ms = START_MS + ((first + np.arange(num)) * (DAY_MS / EVENTS_PER_DAY)).astype(np.int64)
    return Observations(
        loss=loss,
        start=start,
        event_ms=at_ms,
        num_events=rng.integers(0, 120, num),
        types=rng.choice([2, 4], num, p=[0.9, 0.1]),
        new_items=rng.random(num) < 0.05,
        scenes=np.where(rng.random(num) < 0.3, "home", ""),
        users=rng.integers(0, NUM_USERS, num),
        items=rng.integers(0, 500, num),
    )
