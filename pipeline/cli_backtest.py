"""The command that judges adaptation offline, on any interactions."""
# ruff: noqa: D301  # \b is click's mark for a paragraph that keeps its lines; a raw string would lose it

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.cli_output import AsJson, emit_json, say


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(backtest)
    app.command()(search)


def backtest(
    data: Annotated[
        str,
        typer.Argument(
            help="JSON Lines, CSV (both also gzipped) or Parquet of interactions, or ml-100k, or synthetic.",
            metavar="DATA",
        ),
    ],
    items: Annotated[
        str | None, typer.Option(help="Catalogue with texts, as for `items`; without it ids only.")
    ] = None,
    mapping: Annotated[
        Path | None, typer.Option(help="TOML file that says where user, item, type and time are found.")
    ] = None,
    protocol: Annotated[
        Literal["stream", "static"],
        typer.Option(
            help="stream: rank before each event, then learn it. static: after exactly 1, 3, 5, 10, 20 events."
        ),
    ] = "stream",
    phase: Annotated[
        Literal["tune", "test"],
        typer.Option(help="stream only: judge the last 20 % of users, or the 30 % before them."),
    ] = "test",
    query: Annotated[
        Literal["gap", "adjacent"], typer.Option(help="static only: look for events 21 to 40, or for the next 20.")
    ] = "gap",
    peers: Annotated[
        str, typer.Option(help="Comma-separated; also sasrec (slow) and repeats; `none` for innerloop alone.")
    ] = "popular,popular-online,popular-by-position,item-knn,ease,als",
    out: Annotated[Path | None, typer.Option(help="Folder for report.html and report.json.")] = None,
    tensorboard: Annotated[Path | None, typer.Option(help="Folder for TensorBoard logs.")] = None,
    referee_scores: Annotated[
        Path | None, typer.Option(help="Also write what a referee judges: ranks (stream) or scores (static), .npz.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Hyperparameters by `innerloop search`: their name, or a .toml file.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything random in training.")] = 0,
    max_users: Annotated[int, typer.Option(min=10, help="Of a larger file so many users are kept, whole.")] = 50_000,
    judged_users: Annotated[
        int, typer.Option(min=1, help="stream only: so many unseen and so many known users are ranked for.")
    ] = 2000,
    partitions: Annotated[int, typer.Option(min=1, help="stream only: users spread over so many partitions.")] = 1,
    json: AsJson = False,
) -> None:
    """Judge what adaptation would earn on your data.

    Offline: no Kafka, no Postgres. Meta-trains on the users who came first, then runs the worker's own code (decode,
    support set, score, learn) over those who came later, against popularity, ItemKNN, EASE and ALS in the same run.

    Columns are found by their usual names (user_id, item_id, timestamp, rating, …); --mapping says otherwise. Events
    of one user are used in order of time. Nothing of the users to be judged is known to training or to tuning.

    \b
    Examples:
      innerloop backtest ml-100k --out report
      innerloop backtest clicks.jsonl.gz --items catalogue.jsonl --out report
      innerloop backtest orders.parquet --mapping orders.toml --peers popular,item-knn
      innerloop backtest ml-100k --protocol static --referee-scores scores.npz
    """
    from pipeline import backtest as judging
    from pipeline import backtest_output as output
    from pipeline import backtest_plots, backtest_report, backtest_tensorboard, meta_training
    from pipeline.settings import Settings

    settings = Settings.load()
    names = () if peers == "none" else tuple(name.strip() for name in peers.split(",") if name.strip())
    request = judging.Request(
        data=data,
        items=items,
        mapping=mapping,
        phase=phase,
        query=query,
        peers=names,
        seed=seed,
        max_users=max_users,
        judged_users=judged_users,
        num_partitions=partitions,
        recipe=meta_training.recipe_named(settings, recipe),
    )
    if out:
        backtest_plots.check_available()
    if tensorboard:
        backtest_tensorboard.check_available()
    result = judging.run_static(settings, request) if protocol == "static" else judging.run_stream(settings, request)
    if referee_scores:
        output.write_scores(result, referee_scores)
    if tensorboard:
        backtest_tensorboard.write_logs(result, tensorboard)
    report = backtest_report.write_report(result, out) if out else None
    if json:
        emit_json(result.as_json())
    else:
        print(output.as_text(result))
    for path in (report, tensorboard, referee_scores):
        if path:
            say(f"written: {path}")


def search(
    data: Annotated[str, typer.Argument(help="Interactions as for `backtest`.", metavar="DATA")],
    name: Annotated[str, typer.Option(help="Of the recipe; the same name goes on where it stopped.")],
    trials: Annotated[int, typer.Option(min=1, help="Done in all, those of earlier runs included.")] = 30,
    items: Annotated[str | None, typer.Option(help="Catalogue with texts, as for `items`.")] = None,
    mapping: Annotated[Path | None, typer.Option(help="TOML file that says where the fields are found.")] = None,
    phase: Annotated[
        Literal["tune", "test"], typer.Option(help="Fit part of the stream protocol that is searched on.")
    ] = "test",
    seed: Annotated[int, typer.Option(help="Of the draws and of training.")] = 0,
    max_users: Annotated[int, typer.Option(min=10, help="Of a larger file so many users are kept, whole.")] = 50_000,
    json: AsJson = False,
) -> None:
    """Search hyperparameters of meta-training.

    Judged on validation users of the fit part only, so that `backtest` of the same data stays honest. Stop it at any
    time: trials are kept in INNERLOOP_HOME, and the best recipe so far is INNERLOOP_HOME/recipes/NAME.toml.

    \b
    Example:
      innerloop search history.jsonl.gz --items catalogue.jsonl --name shop --trials 50
      innerloop backtest history.jsonl.gz --items catalogue.jsonl --recipe shop
      innerloop meta-train history.jsonl.gz --items catalogue.jsonl --recipe shop
    """
    from pipeline.backtest import Request
    from pipeline.backtest_search import search as search_recipe
    from pipeline.settings import Settings

    request = Request(data=data, items=items, mapping=mapping, phase=phase, seed=seed, max_users=max_users)
    found = search_recipe(Settings.load(), request, name=name, trials=trials)
    if json:
        emit_json(found.as_json())
    else:
        print(found.as_text())
