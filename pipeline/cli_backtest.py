"""The commands that judge adaptation offline, on any interactions."""
# ruff: noqa: D301  # \b is click's mark for a paragraph that keeps its lines; a raw string would lose it

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pipeline.cli_output import AsJson, emit_json, say

if TYPE_CHECKING:
    from pipeline.backtest_result import StreamResult
    from pipeline.backtest_static import StaticResult

# What is judged
Data = Annotated[
    str,
    typer.Argument(
        help="JSON Lines, CSV (both also gzipped) or Parquet of interactions, or ml-100k, or synthetic.",
        metavar="DATA",
    ),
]
Items = Annotated[str | None, typer.Option(help="Catalogue with texts, as for `items`; without it ids only.")]
Mapped = Annotated[Path | None, typer.Option(help="TOML file that says where user, item, type and time are found.")]
MaxUsers = Annotated[
    int, typer.Option(min=10, help="Of a larger file so many users are kept, whole, chosen by a hash of the id.")
]
Seed = Annotated[int, typer.Option(help="Of everything random in training.")]

# How
Protocol = Annotated[
    Literal["stream", "static"],
    typer.Option(help="stream: rank before each event, then learn it. static: after exactly 1, 3, 5, 10, 20 events."),
]
Phase = Annotated[
    Literal["tune", "test"],
    typer.Option(help="stream only: judge the last 20 % of users, or the 30 % before them."),
]
Query = Annotated[
    Literal["gap", "adjacent"], typer.Option(help="static only: look for events 21 to 40, or for the next 20.")
]
Peers = Annotated[
    str | None,
    typer.Option(
        help="Comma-separated: popular, popular-online, popular-by-position, item-knn, ease, als (as far as installed, "
        "the default), sasrec (slow), repeats; `none` for innerloop alone.",
        show_default=False,
    ),
]
RecipeName = Annotated[
    str | None, typer.Option("--recipe", help="Hyperparameters by `innerloop search`: their name, or a .toml file.")
]
JudgedUsers = Annotated[
    int,
    typer.Option(min=1, help="So many users are ranked for, chosen by a hash (stream: so many unseen, so many known)."),
]
Partitions = Annotated[int, typer.Option(min=1, help="stream only: users spread over so many partitions.")]

# What is written
Report = Annotated[Path | None, typer.Option("--out", help="Folder for report.html and report.json.")]
Tensorboard = Annotated[Path | None, typer.Option(help="Folder for TensorBoard logs.")]
RefereeScores = Annotated[
    Path | None, typer.Option(help="Also write what a referee judges: ranks (stream) or scores (static), .npz.")
]


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(backtest)
    app.command()(search)


def backtest(
    data: Data,
    items: Items = None,
    mapping: Mapped = None,
    protocol: Protocol = "stream",
    phase: Phase = "test",
    query: Query = "gap",
    peers: Peers = None,
    recipe: RecipeName = None,
    seed: Seed = 0,
    max_users: MaxUsers = 50_000,
    judged_users: JudgedUsers = 2000,
    partitions: Partitions = 1,
    out: Report = None,
    tensorboard: Tensorboard = None,
    referee_scores: RefereeScores = None,
    json: AsJson = False,
) -> None:
    """Judge what adaptation would earn on your data.

    Offline: no Kafka, no Postgres. Meta-trains on the users who came first, then runs the worker's own code (decode,
    support set, score, learn) over those who came later, against popularity, ItemKNN, EASE and ALS in the same run.

    Columns are found by their usual names (user_id, item_id, timestamp, rating, …); --mapping says otherwise. Events
    of one user are used in order of time. Nothing of the users to be judged is known to training or to tuning.

    A large file is read in bounded memory: --max-users keeps whole users of it, --judged-users ranks for some of those.
    The report says what was left out.

    \b
    Examples:
      innerloop backtest ml-100k --out report
      innerloop backtest clicks.jsonl.gz --items catalogue.jsonl --out report
      innerloop backtest orders.parquet --mapping orders.toml --peers popular,item-knn
      innerloop backtest ml-100k --protocol static --referee-scores scores.npz
    """
    from pipeline.backtest import Request, run_static, run_stream
    from pipeline.meta_training import recipe_named
    from pipeline.settings import Settings

    wanted = _Wanted(out, tensorboard, referee_scores, json)
    wanted.check_available()
    settings = Settings.load()
    request = Request(
        data=data,
        items=items,
        mapping=mapping,
        phase=phase,
        query=query,
        peers=_peers(peers),
        seed=seed,
        max_users=max_users,
        judged_users=judged_users,
        num_partitions=partitions,
        recipe=recipe_named(settings, recipe),
    )
    wanted.write(run_static(settings, request) if protocol == "static" else run_stream(settings, request))


def _peers(names: str | None) -> tuple[str, ...]:
    from pipeline.backtest_peers import usual

    if names is None:
        return usual()
    return () if names == "none" else tuple(name.strip() for name in names.split(",") if name.strip())


@dataclass(frozen=True)
class _Wanted:
    """Where the result of a backtest goes."""

    report: Path | None
    tensorboard: Path | None
    referee_scores: Path | None
    json: bool

    def check_available(self) -> None:
        """Raises ConfigurationError before any work is done where a library is missing."""
        from pipeline import backtest_plots, backtest_tensorboard

        if self.report:
            backtest_plots.check_available()
        if self.tensorboard:
            backtest_tensorboard.check_available()

    def write(self, result: StreamResult | StaticResult) -> None:
        """Write the files that were asked for, print the figures, and say where the files are."""
        from pipeline import backtest_output, backtest_report, backtest_tensorboard

        written = [path for path in (self.tensorboard, self.referee_scores) if path]
        if self.referee_scores:
            backtest_output.write_scores(result, self.referee_scores)
        if self.tensorboard:
            backtest_tensorboard.write_logs(result, self.tensorboard)
        if self.report:
            written.insert(0, backtest_report.write_report(result, self.report))
        if self.json:
            emit_json(result.as_json())
        else:
            print(backtest_output.as_text(result))
        for path in written:
            say(f"written: {path}")


def search(
    data: Annotated[str, typer.Argument(help="Interactions as for `backtest`.", metavar="DATA")],
    name: Annotated[str, typer.Option(help="Of the recipe; the same name goes on where it stopped.")],
    trials: Annotated[int, typer.Option(min=1, help="Done in all, those of earlier runs included.")] = 30,
    items: Items = None,
    mapping: Mapped = None,
    phase: Annotated[
        Literal["tune", "test"], typer.Option(help="Fit part of the stream protocol that is searched on.")
    ] = "test",
    seed: Seed = 0,
    max_users: MaxUsers = 50_000,
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
