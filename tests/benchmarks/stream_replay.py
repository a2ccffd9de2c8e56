"""The same judged file as `referee`, from the ranker alone: seconds instead of minutes, for choosing on `tune`.

    python -m tests.benchmarks.stream_replay --phase tune --out replay.npz [--frozen]

Consecutive events go to the ranker 64 at a time, several of one user in one call (`previous`); the item side moves at
every 1,024th event, or not at all with --frozen. Every look at `test` is written into LOG.md.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models import popularity
from models.encoder import resolve_encoder
from models.episodes import Interactions, following
from models.figures import interval, query_ranks, set_ndcg, user_means
from models.item_tables import assemble_items
from models.meta_parameters import MetaParameters
from models.ranker import Ranker, TaskBatch
from models.replay import QUERY, ItemSide
from pipeline.embeddings import cached_embeddings
from tests.benchmarks.stream import Stream, load_stream, train

CHUNK = 64


class Replay:
    """A ranker over the whole catalogue, every user's inner state, and the popularity counts."""

    def __init__(self, stream: Stream, parameters: MetaParameters, home: Path) -> None:
        films = sorted(stream.data.films, key=lambda film: film.item_id.encode())
        row_of = {film.item_id: row for row, film in enumerate(films)}
        index = parameters.rows_of(film.item_id for film in films)
        embeddings = cached_embeddings(resolve_encoder("auto"), [film.text for film in films], home / "cache")
        self.ranker = Ranker(parameters, assemble_items(parameters, embeddings, index))
        rows = np.concatenate([stream.fit, stream.events])
        items = torch.tensor([row_of[str(item)] for item in stream.data.items[rows].tolist()])
        users = torch.from_numpy(np.unique(stream.data.users[rows], return_inverse=True)[1])
        times = torch.from_numpy(stream.data.seconds[rows] * 1000)
        self.events = Interactions(users, items, times, torch.ones(len(rows)), len(films))
        self.side = ItemSide(self.ranker, self.events)
        self.history = self.side.history
        self.state = torch.zeros(int(users.max()) + 1, self.ranker.state_size)
        self.state_events = torch.zeros(len(self.state), dtype=torch.int64)
        self.track = torch.zeros(len(self.state), self.ranker.track_size)

    def apply(self, events: Tensor) -> tuple[Tensor, Tensor]:
        """Rank the next ten items of consecutive events, adapted and start [U, 10], then learn the events."""
        tasks, priors = self.side.tasks_before(events), self.side.priors
        users = self.events.users[events]
        previous = _previous(users)
        tasks.state, tasks.state_events, tasks.track = self.state[users], self.state_events[users], self.track[users]
        step = self.ranker.step(tasks, priors, self.events.items[events], previous)
        follows = previous >= 0
        tasks.state[follows] = step.state[previous[follows]]
        tasks.state_events[follows] = step.state_events[previous[follows]]
        tasks.track[follows] = step.track[previous[follows]]
        # later rows of a user overwrite earlier ones
        for row, user in enumerate(users.tolist()):
            self.state[user], self.state_events[user] = step.state[row], step.state_events[row]
            self.track[user] = step.track[row]
        return self._ranks(tasks, priors, events)

    def _ranks(self, tasks: TaskBatch, priors: Tensor, events: Tensor) -> tuple[Tensor, Tensor]:
        query = following(self.history, self.events.items, events, QUERY)
        adapted, start = self.ranker.logits(tasks, priors)
        return query_ranks(adapted, query), query_ranks(start, query)


def _previous(users: Tensor) -> Tensor:
    last: dict[int, int] = {}
    found = []
    for row, user in enumerate(users.tolist()):
        found.append(last.get(user, -1))
        last[user] = row
    return torch.tensor(found)


def run(stream: Stream, parameters: MetaParameters, home: Path, *, frozen: bool) -> tuple[Tensor, Tensor]:
    """Ranks [N, 10] of the next ten items, adapted and start, 0 where there are fewer."""
    replay, first = Replay(stream, parameters, home), len(stream.fit)
    ranks = []
    for epoch in torch.split(torch.arange(first, first + len(stream.events)), popularity.POPULARITY_EPOCH):
        ranks += [replay.apply(chunk) for chunk in torch.split(epoch, CHUNK)]
        if not frozen:
            replay.side.advance(epoch)
    adapted, start = zip(*ranks, strict=True)
    return torch.cat(adapted), torch.cat(start)


def main() -> None:
    """Meta-train before the cut, replay what follows, print the figures, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phase", choices=["tune", "test"], default="tune")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--home", type=Path, default=Path.home() / ".innerloop")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--frozen", action="store_true", help="the item side as it was at the cut")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    stream = load_stream(arguments.home, arguments.phase)
    began = time.perf_counter()
    parameters = train(stream, arguments.home, seed=arguments.seed)
    trained = time.perf_counter()
    adapted, start = run(stream, parameters, arguments.home, frozen=arguments.frozen)
    print(f"meta-training {trained - began:.1f} s, replay {time.perf_counter() - trained:.1f} s")
    unseen = torch.from_numpy(stream.unseen)
    users = torch.from_numpy(stream.data.users[stream.events].astype(np.int64))[unseen]
    for name, slots in (("set", QUERY), ("next item", 1)):
        both = [user_means(set_ndcg(ranks[unseen, :slots]), users) for ranks in (adapted, start)]
        for what, values in (("adapted", both[0]), ("start", both[1]), ("adapted - start", both[0] - both[1])):
            print(f"{name} nDCG@10 of unseen users, {what}: {interval(values).as_list()}")
    if arguments.out:
        absent = torch.where(adapted > 0, adapted, -1.0).numpy().astype(np.float32)
        number = np.unique(stream.data.users, return_inverse=True)[1][stream.events].astype(np.int32)
        columns = {"user": number, "K": stream.num_events.astype(np.int32), "rank": absent[:, 0], "ranks10": absent}
        np.savez_compressed(arguments.out, allow_pickle=False, **columns, unseen=stream.unseen)


if __name__ == "__main__":
    main()
