"""The command that says why an item stands where it stands for a user."""

# ruff: noqa: D301  # \b is click's mark for a paragraph that keeps its lines; a raw string would lose it
from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli_database import opened
from pipeline.cli_output import AsJson, columns, emit_json, say

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from pipeline.explanation import Explanation
    from pipeline.explanation_rows import UserRows
    from pipeline.settings import Settings

SHOWN_EVENTS = 10  # that speak for the item, and against it, unless --all
SHARES = {
    "taste": "taste: what the events of the support set say",
    "popularity": "popularity among users with as many events",
    "bonus": "items often taken with the newest ones, or again",
    "adapter": "the adapter",
}


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(explain)


def explain(
    user: Annotated[str, typer.Argument(help="The user's id.", metavar="USER")],
    item: Annotated[str, typer.Argument(help="The item's id, listed for the user or not.", metavar="ITEM")],
    every: Annotated[bool, typer.Option("--all", help="Every event of the support set.")] = False,
    json: AsJson = False,
) -> None:
    """Show why an item stands where it stands for a user.

    The user's row is read with the partition's counts, and the worker's own code computes the score again: as a sum of
    shares, and once without each event of the support set. Shares are in nats, score = 1 / (1 + exp(-sum)); what counts
    for the order is the rank that the item would have without. Needs a reader's login and the artefacts.

    \b
    Examples:
      innerloop explain u42 sku-7
      innerloop explain u42 sku-7 --all
      innerloop explain u42 sku-7 --json | jq '.events[] | select(.logit > 0) | .item_id'
    """
    from pipeline.explanation import Unexplained
    from pipeline.explanation_rows import read_user
    from pipeline.session import Session
    from pipeline.settings import Settings

    settings = Settings.load()
    engine = opened(settings, "reader")
    rows = read_user(Session(engine), settings.topic_interactions, user, item)
    if rows is None:
        return _popular(engine, user, item, json=json)
    try:
        found = _explained(settings, engine, rows, item)
    except Unexplained as reason:
        say(f"innerloop: {reason}")
        raise typer.Exit(1) from None
    if json:
        emit_json({**asdict(found), "stored": rows.listed and asdict(rows.listed), "updated_at": rows.updated_at})
    else:
        _print(found, rows, every=every)


def _explained(settings: Settings, engine: Engine, rows: UserRows, item: str) -> Explanation:
    """Compute the user's scores as a worker that has just taken the partition over."""
    from models.ranker import Ranker
    from pipeline import arithmetic
    from pipeline.catalogue import build_catalogue, listed_rows
    from pipeline.explanation import explain
    from pipeline.worker_sources import empty_adaptation, version_sources

    arithmetic.prepare(settings.torch_threads)
    sources = version_sources(settings, engine)
    parameters = sources.parameters(rows.version)
    embeddings = sources.embeddings([listed.text for listed in listed_rows(rows.items)], parameters)
    catalogue = build_catalogue(rows.snapshot, rows.items, embeddings, parameters)
    adaptation = empty_adaptation(settings, 1)
    adaptation.activate(rows.version, Ranker(parameters, catalogue.tables), catalogue)
    adaptation.statistics |= rows.statistics
    adaptation.take_up(rows.partition)
    rows.fill(adaptation.table)
    return explain(adaptation, rows.row[0], item, {listed.item_no: listed for listed in rows.items})


def _popular(engine: Engine, user: str, item: str, *, json: bool) -> None:
    """Say where the item stands for somebody without events."""
    from pipeline import reading

    place = next((line for line in reading.recommend(engine, user, 1000) if line.item_id == item), None)
    if json:
        emit_json({"user_id": user, "item_id": item, "source": "popular", "stored": place and place.__dict__})
        return
    print(f"{user} has no events (or was forgotten): the list is that of all users without events, by popularity alone")
    print(f"{item} stands at rank {place.rank} of it" if place else f"{item} is not among its first 1,000")


def _print(found: Explanation, rows: UserRows, *, every: bool) -> None:
    from pipeline.explanation import NEVER_LISTED

    print(f"{found.text or found.item_id} [{found.item_id}] for user {found.user_id}")
    if found.excluded:
        print(f"never listed: {NEVER_LISTED[found.excluded]}. What follows is how it would stand else.")
    stored = f"rank {rows.listed.rank}, score {rows.listed.score:.4f}" if rows.listed else "not in it"
    print(f"now           rank {found.rank:,}, score {found.score:.4f}")
    print(f"stored list   {stored}; version {found.version}, {rows.updated_at:%Y-%m-%d %H:%M:%S} UTC,")
    print(f"              after {found.num_events:,} positives, the last event at partition {found.partition} "
          f"offset {found.last_offset:,}")  # fmt: skip
    print(f"adapter       {_adapter(found)}\n")
    shares = [(SHARES[name], logit, rank) for name, (logit, rank) in found.shares.items()]
    print(
        columns(("what adds up to the score", "nats", "rank without"), [*shares, ("calibration", found.offset, None)])
    )
    ordered = sorted(found.events, key=lambda event: -event.logit)
    speak_for = [event for event in ordered if event.logit > 0]
    against = [event for event in ordered[::-1] if event.logit < 0]
    for title, events in (("events that speak for it", speak_for), ("events that speak against it", against)):
        shown = events if every else events[:SHOWN_EVENTS]
        lines = [(e.events_ago, e.type, e.logit, e.rank_without, e.item_id, e.text[:60]) for e in shown]
        if lines:
            print(f"\n{title}{'' if len(shown) == len(events) else f', the strongest {len(shown)} of {len(events)}'}")
            print(columns(("events ago", "type", "nats", "rank without", "item_id", "text"), lines))


def _adapter(found: Explanation) -> str:
    learnt = f"learnt from the errors of {found.adapter_events:,} predictions"
    return {
        "unused": "not used: nothing learnt yet, or switched off in this version",
        "served": f"served, {learnt}",
        "gated": f"not served: it lately lost to its start ({learnt})",
        "diverged": "not served: it had diverged and begins anew",
    }[found.adapter]
