"""Synthetic streams whose truth is known: who would choose what, with which probability, and when that changes.

The model: an item is a mixture of R topics, and its text is made of its topics' words, so the text tells the taste.
A user is a vector over the topics.  With exposure x_i (Zipf over the items), the next new item is drawn from

    P(i | u, t) ∝ x_i · exp(sharpness · taste_u · topics_i + daily_taste · cos(2π (hour_t − peak_i) / 24))

over the items that the user has not had; a share `repeats` of the events returns to one that the user has had, with
the probabilities above times `count_i^habit * recency^(own events since i)`, as people buy the same groceries again.
Every choice comes with that distribution, so the best possible nDCG of a stream can be computed (`best_ndcg`).
Letters: U users, N items, R topics.
"""

from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
DriftKind = Literal["taste", "exposure", "meaning"]

DAY_MS = 86_400_000
START_MS = 1_704_067_200_000  # 2024-01-01T00:00:00Z

TOPICS: dict[str, str] = {
    "space": "rocket galaxy astronaut orbit planet telescope comet starship",
    "crime": "detective heist murder alibi gangster police robbery suspect",
    "romance": "wedding kiss love sweetheart valentine affair bride longing",
    "horror": "ghost vampire curse graveyard scream haunted zombie demon",
    "war": "soldier battlefield general trench bomber siege regiment tank",
    "music": "guitar orchestra singer jazz concert piano drummer melody",
    "sport": "football boxing champion stadium coach marathon league racing",
    "nature": "forest river wolf mountain ocean whale jungle eagle",
    "comedy": "joke clown prank sitcom parody slapstick laughter farce",
    "history": "empire king castle knight pharaoh revolution queen dynasty",
    "technology": "computer robot hacker software satellite laboratory android circuit",
    "cooking": "kitchen recipe chef bakery spice dessert restaurant oven",
}


@dataclass(frozen=True)
class Drift:
    """From choice number `at` on, a share of the users has another taste, or a share of the items another role.

    Tastes are what inner loops follow by themselves. With `exposure` the items are shown as often as others were. With
    `meaning` each stands for what another did, as in a shop that uses its article numbers again: its topics are
    another's, its text and exposure stay, so tables and texts mislead until they are learnt anew.
    With `own`, `at` counts each user's own choices: tastes change at the same point of different histories.
    """

    at: int
    kind: DriftKind = "taste"
    share: float = 1.0
    own: bool = False


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One reproducible stream: the same plan gives the same bytes.

    Attributes:
        choices: number of events that are choices (impressions, duplicates and malformed messages come on top).
        topics: R, at most twelve.
        sharpness: how strongly taste decides; 0 leaves exposure alone.
        activity: exponent of Zipf's law over users; 0 makes all users equally active.
        exposure: exponent of Zipf's law over items.
        choices_per_day: mean rate in event time.
        daily_rate: amplitude of the rate's daily cycle, 0 to 1.
        daily_taste: amplitude of the topics' daily cycle, in logits.
        repeats: share of choices that return to an earlier item of the user.
        habit: exponent of how often an item was had before, for returns; 0 makes habits irrelevant.
        recency: what remains of the pull of an item per own event since, for returns; 1 forgets nothing.
        basket: mean number of choices that a user makes in a row, none twice; 1 for independent choices.
        arrivals: share of the stream over which the users arrive one after the other; 0 when all are there at once.
        stay: share of the stream after which a user who has arrived leaves for good; 0 when nobody does.
        impressions: impressions before each choice, the chosen item among them; 0 for none.
        types: types of the choices with their shares.
        drifts: what changes when, in order of `at`.

    """

    users: int = 1000
    items: int = 500
    choices: int = 20_000
    topics: int = 8
    seed: int = 0
    sharpness: float = 3.0
    activity: float = 1.0
    exposure: float = 0.7
    choices_per_day: float = 5000.0
    daily_rate: float = 0.0
    daily_taste: float = 0.0
    repeats: float = 0.0
    habit: float = 0.0
    recency: float = 1.0
    basket: float = 1.0
    arrivals: float = 0.0
    stay: float = 0.0
    impressions: int = 0
    types: tuple[tuple[str, float], ...] = (("click", 0.9), ("purchase", 0.1))
    drifts: tuple[Drift, ...] = ()

    def __post_init__(self) -> None:
        """Refuse plans that mean nothing (ValueError)."""
        if min(self.users, self.items) < 1 or self.choices < 0 or not 1 <= self.topics <= len(TOPICS):
            raise ValueError(f"at least one user and item, and 1 to {len(TOPICS)} topics")
        if not (0 <= self.daily_rate < 1 and 0 <= self.repeats <= 1 and self.choices_per_day > 0):
            raise ValueError("daily_rate lies in [0, 1), repeats in [0, 1], choices_per_day above 0")
        if not (0 < self.recency <= 1 and self.basket >= 1 and 0 <= self.arrivals <= 1):
            raise ValueError("recency lies in (0, 1], basket is at least 1, arrivals lies in [0, 1]")
        if self.stay and not 0 < self.stay <= self.arrivals == 1:
            raise ValueError("users leave (stay above 0) only where they arrive over the whole stream (arrivals 1)")
        if any(drift.own and drift.kind != "taste" for drift in self.drifts):
            raise ValueError("only tastes change at a user's own choice")
        if any(later.at < earlier.at for earlier, later in pairwise(d for d in self.drifts if not d.own)):
            raise ValueError("drifts are in order of their event")


@dataclass(frozen=True)
class Drawn:
    """One event and its truth: `truth` [N] is the distribution the choice was drawn from, None for impressions."""

    event: dict[str, Any]
    user: int
    item: int
    truth: Floats | None


def user_id(user: int) -> str:
    """The id of a user number."""
    return f"user-{user}"


def item_id(item: int) -> str:
    """The id of an item number."""
    return f"item-{item}"


def item_topics(plan: Plan) -> Floats:
    """[N, R] mixtures of topics, most items of one or two."""
    mixtures: Floats = np.random.default_rng([plan.seed, 1]).dirichlet(np.full(plan.topics, 0.25), plan.items)
    return mixtures


def catalogue(plan: Plan) -> Iterator[dict[str, Any]]:
    """The items of the contract: a title, then a dozen words of the item's topics."""
    rng = np.random.default_rng([plan.seed, 2])
    names, words = list(TOPICS), [text.split() for text in TOPICS.values()]
    for item, mixture in enumerate(item_topics(plan)):
        drawn = rng.choice(plan.topics, size=12, p=mixture)
        chosen = [words[topic][rng.integers(len(words[topic]))] for topic in drawn]
        topic = names[int(mixture.argmax())]
        text = f"{chosen[0]} {chosen[1]} {item} ({topic}). {' '.join(chosen[2:])}"
        yield {"v": 1, "item_id": item_id(item), "text": text, "attributes": {"topic": topic}, "available": True}


def changing_users(plan: Plan, drift: Drift) -> NDArray[np.bool_]:
    """[U] whose taste a drift with `own` changes."""
    chance = np.random.default_rng([plan.seed, 6, drift.at]).random(plan.users)
    changing: NDArray[np.bool_] = chance < drift.share
    return changing


@dataclass(slots=True)
class _Had:
    """What a user has had, each item in a column of arrays that grow: a choice looks at all of them at once."""

    place: dict[int, int] = field(default_factory=dict)
    rows: NDArray[np.int64] = field(default_factory=lambda: np.zeros((3, 4), np.int64))

    def add(self, item: int, number: int) -> None:
        """Count an item taken at this own choice."""
        at = self.place.setdefault(item, len(self.place))
        if at == self.rows.shape[1]:
            self.rows = np.concatenate([self.rows, np.zeros_like(self.rows)], 1)
        self.rows[:, at] = item, self.rows[1, at] + 1, number

    @property
    def columns(self) -> NDArray[np.int64]:
        """[3, n] items, counts and last own choices."""
        return self.rows[:, : len(self.place)]


class _World:
    """The state of a stream that choices are drawn from: tastes, exposure, the clock, and what each user has had."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.rng = np.random.default_rng([plan.seed, 3])
        self.mixtures = item_topics(plan)
        self.tastes = self._draw_tastes(plan.users)
        self.exposure = self.rng.permutation(zipf(plan.items, plan.exposure))
        self.activity = np.cumsum(self.rng.permutation(zipf(plan.users, plan.activity)))
        self.had: defaultdict[int, _Had] = defaultdict(_Had)
        self.own_choices = np.zeros(plan.users, np.int64)
        self.own_drifts = [(drift.at, changing_users(plan, drift)) for drift in plan.drifts if drift.own]
        self.basket: set[int] = set()
        self.last_user = -1
        self.now_ms = float(START_MS)

    def _draw_tastes(self, users: int) -> Floats:
        return self.rng.standard_normal((users, self.plan.topics))

    def drift(self, drift: Drift) -> None:
        """Gives a share of the users a new taste, or deals a share of the items' exposure or topics out again."""
        size = self.plan.users if drift.kind == "taste" else self.plan.items
        moved = self.rng.permutation(size)[: round(drift.share * size)]
        if drift.kind == "taste":
            self.tastes[moved] = self._draw_tastes(len(moved))
        elif drift.kind == "meaning":
            self.mixtures[moved] = self.mixtures[np.roll(moved, 1)]  # one cycle: none keeps its own
        else:
            self.exposure[moved] = self.exposure[self.rng.permutation(moved)]

    def advance_clock(self) -> None:
        """To the next event of a Poisson process whose rate follows the hour, densest at 6 o'clock."""
        daily = 1.0 + self.plan.daily_rate * np.sin(2 * np.pi * self.now_ms / DAY_MS)
        self.now_ms += self.rng.exponential(DAY_MS / (self.plan.choices_per_day * daily))

    def next_user(self, number: int) -> int:
        """Who chooses: the same user while the basket fills, then anybody who has arrived and not left."""
        goes_on = self.plan.basket > 1 and 0 < len(self.basket) < self.plan.items
        if goes_on and self.rng.random() < 1 - 1 / self.plan.basket:
            return self.last_user
        self.basket.clear()
        arriving = self.plan.arrivals * self.plan.choices
        arrived = self.plan.users if number >= arriving else 1 + int(number * self.plan.users / arriving)
        left = max(0, arrived - max(1, round(self.plan.stay * self.plan.users))) if self.plan.stay else 0
        before = self.activity[left - 1] if left else 0.0
        self.last_user = left + _one(self.activity[left:arrived] - before, self.rng)
        return self.last_user

    def choose(self, user: int, item: int) -> None:
        """Remember a choice; tastes that change at this point of the user's history change before the next one."""
        self.own_choices[user] += 1
        self.had[user].add(item, int(self.own_choices[user]))
        if self.plan.basket > 1:
            self.basket.add(item)
        for at, changing in self.own_drifts:
            if changing[user] and self.own_choices[user] == at:
                self.tastes[user] = self._draw_tastes(1)[0]

    def truth(self, user: int) -> Floats:
        """[N] probabilities of the user's next choice."""
        logits = self.plan.sharpness * (self.mixtures @ self.tastes[user])
        if self.plan.daily_taste:
            peaks = self.mixtures.argmax(1) / self.plan.topics
            logits += self.plan.daily_taste * np.cos(2 * np.pi * (self.now_ms / DAY_MS - peaks))
        # Never quite zero: an item that only its owner would return to must keep a probability.
        wanted: Floats = self.exposure * np.exp(np.maximum(logits - logits.max(), -50.0))
        again = np.zeros_like(wanted)
        had, counts, last = self.had[user].columns
        pull = counts**self.plan.habit * np.maximum(self.plan.recency ** (self.own_choices[user] - last), 1e-12)
        again[had] = wanted[had] * pull
        wanted[had] = 0.0
        again[list(self.basket)] = 0.0
        share = self.plan.repeats
        if again.sum() == 0 or wanted.sum() == 0:
            share = 1.0 if wanted.sum() == 0 else 0.0
        mixed: Floats = (1 - share) * wanted / max(wanted.sum(), 1e-300) + share * again / max(again.sum(), 1e-300)
        return mixed


def draw_events(plan: Plan) -> Iterator[Drawn]:
    """The stream of a plan, in order of time, each choice with its truth."""
    world, drifts = _World(plan), deque(drift for drift in plan.drifts if not drift.own)
    names = [name for name, _ in plan.types]
    shares = np.array([share for _, share in plan.types])
    for number in range(plan.choices):
        while drifts and drifts[0].at <= number:
            world.drift(drifts.popleft())
        world.advance_clock()
        user = world.next_user(number)
        truth = world.truth(user)
        item = _one(np.cumsum(truth), world.rng)
        yield from _impressions(world, number, user, item)
        kind = names[_one(np.cumsum(shares), world.rng)]
        yield Drawn(_event(f"c-{number}", user, item, kind, world.now_ms), user, item, truth)
        world.choose(user, item)


def _impressions(world: _World, number: int, user: int, chosen: int) -> Iterator[Drawn]:
    """The slate that a choice was made from: by exposure, with the chosen item at a random place."""
    size = world.plan.impressions
    if size == 0:
        return
    slate = world.rng.choice(world.plan.items, size=size, p=world.exposure)
    slate[world.rng.integers(size)] = chosen
    for place, item in enumerate(slate.tolist()):
        event = _event(f"c-{number}-{place}", user, item, "impression", world.now_ms)
        yield Drawn(event, user, item, None)


def _event(event_id: str, user: int, item: int, kind: str, at_ms: float) -> dict[str, Any]:
    ids = {"event_id": event_id, "user_id": user_id(user), "item_id": item_id(item)}
    return {"v": 1, **ids, "type": kind, "ts": int(at_ms)}


def best_ndcg(truth: Floats, k: int = 10) -> float:
    """The expected nDCG@k of one draw from `truth` under the best list there is: items by falling probability."""
    best = np.sort(truth)[::-1][:k]
    return float((best / np.log2(np.arange(len(best)) + 2)).sum())


def zipf(size: int, exponent: float) -> Floats:
    """[size] probabilities falling as 1 / rank^exponent."""
    weights: Floats = np.arange(1, size + 1, dtype=np.float64) ** -exponent
    weights /= weights.sum()
    return weights


def draw(law: Floats, rng: np.random.Generator, size: int) -> NDArray[np.int64]:
    """[size] indices drawn from a cumulated distribution that need not end at 1."""
    drawn = np.searchsorted(law, rng.random(size) * law[-1], side="right")
    # A product that rounds up to the total would point behind the end.
    inside: NDArray[np.int64] = np.minimum(drawn, len(law) - 1)
    return inside


def _one(law: Floats, rng: np.random.Generator) -> int:
    return int(draw(law, rng, 1)[0])
