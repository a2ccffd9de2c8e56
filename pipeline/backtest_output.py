"""Files beside a backtest's report: what the referees judge, and its figures as text.

The referees' files number users and items ascending by id, as numbers where all ids are numbers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from models.figures import Interval
from pipeline.backtest_peers import TITLES
from pipeline.backtest_result import BOTH, PRIMARY, StreamResult
from pipeline.backtest_static import StaticResult
from pipeline.cli_output import columns
from pipeline.interaction_log import ordered_by_id
from pipeline.protocols import SHOTS
from pipeline.support import Ints


def write_scores(result: StreamResult | StaticResult, path: Path) -> None:
    """Write the file that the protocol's referee judges."""
    if isinstance(result, StreamResult):
        _write_stream_scores(result, path)
    else:
        _write_static_scores(result, path)


def as_text(result: StreamResult | StaticResult) -> str:
    """Headline and tables, for a terminal."""
    return _stream_text(result) if isinstance(result, StreamResult) else _static_text(result)


def _write_stream_scores(result: StreamResult, path: Path) -> None:
    """Write user, K, rank, ranks10 and unseen of each judged event in stream order; -1 = absent."""
    adapted, start = (result.contests[name].judged.ranks for name in BOTH)
    given = {
        name: np.where(ranks > 0, ranks, -1).astype(np.float32)
        for name, ranks in zip(BOTH, (adapted, start), strict=True)
    }
    np.savez_compressed(
        path,
        allow_pickle=False,
        user=result.users.astype(np.int32),
        K=result.num_events.astype(np.int32),
        rank=given["adapted"][:, 0],
        ranks10=given["adapted"],
        ranks10_start=given["start"],
        unseen=result.cut.unseen[result.asked],
    )


def _write_static_scores(result: StaticResult, path: Path) -> None:
    """Write one array [cases, items] per K, named k1, k3, …: cases in the order of users, items ascending by id."""
    place = _columns(result.log.item_ids)
    scores = {f"k{shots}": result.scores["adapted"][shots][:, place] for shots in SHOTS}
    np.savez_compressed(path, allow_pickle=False, **scores)


def _stream_text(result: StreamResult) -> str:
    """Headline, peers, and the gain over K, for a terminal."""
    names = ["adapted", "start", *result.peers]
    overall = {name: result.overall(name).metrics for name in names}
    table = [
        (
            TITLES[name],
            overall[name][PRIMARY].mean,
            overall[name]["ndcg"].mean,
            overall[name]["hit"].mean,
            "" if name == "adapted" else _signed(result.ahead(name).metrics[PRIMARY]),
        )
        for name in names
    ]
    over = result.reference
    titles = ("start", "adaptation earned") if over == "start" else (TITLES[over], "ahead by")
    rows = zip(result.ahead_by_k(over), result.by_k("adapted"), result.by_k(over), strict=True)
    gains = [
        (
            gain.label,
            gain.num_users,
            own.metrics[PRIMARY].mean,
            other.metrics[PRIMARY].mean,
            _signed(gain.metrics[PRIMARY]),
        )
        for gain, own, other in rows
    ]
    return "\n\n".join(
        [
            "\n".join(result.headline()),
            columns(("unseen users", "nDCG@10 of the next ten", "next item", "hit@10", "adapted ahead by"), table),
            columns(("K", "users", "adapted", *titles), gains),
            *(["\n".join(result.notes)] if result.notes else []),
        ]
    )


def _static_text(result: StaticResult) -> str:
    """Headline and one table, for a terminal."""
    names = result.names
    table = [
        (
            TITLES[name],
            *(f"{result.at(name, shots)[0].mean:.3f}/{result.at(name, shots)[1].mean:.3f}" for shots in SHOTS),
            "" if name == "adapted" else _signed(result.ahead(name)[0]),
        )
        for name in names
    ]
    headers = ("nDCG@10/Recall@10", *(f"K={shots}" for shots in SHOTS), "adapted ahead by, mean over K")
    return "\n\n".join(["\n".join(result.headline()), columns(headers, table), "\n".join(result.notes)]).rstrip()


def _signed(interval: Interval) -> str:
    return f"{interval.mean:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"


def _columns(item_ids: tuple[str, ...]) -> Ints:
    row_of = {item_id: row for row, item_id in enumerate(item_ids)}
    return np.array([row_of[item_id] for item_id in ordered_by_id(item_ids)])
