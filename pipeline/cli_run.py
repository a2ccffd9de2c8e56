"""Commands that set up and run: migrate, worker, monitor, config, demo."""

# ruff: noqa: D301  # \b is click's mark for a paragraph that keeps its lines; a raw string would lose it
from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.cli_output import AsJson, columns, emit_json


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(demo)
    app.command()(migrate)
    app.command()(worker)
    app.command()(monitor)
    app.command()(config)


def migrate(json: AsJson = False) -> None:
    """Make or upgrade schema, roles and topics.

    Safe to repeat. Needs the owner's login.

    Nothing else makes topics. INNERLOOP_PARTITIONS is their number of partitions, and cannot change afterwards:
    users live in partitions.

    \b
    Example:
      INNERLOOP_BROKER=kafka:9092 INNERLOOP_DATABASE_URL=postgresql://owner@db/shop innerloop migrate
    """
    from pipeline import topics
    from pipeline.settings import Settings
    from schemas import database

    settings = Settings.load()
    broker, url = settings.connection("owner")
    # The broker first: it answers a wrong address at once, and refuses other partitions before anything is changed.
    made = topics.ensure_topics(broker, topics.topic_configs(settings), settings.partitions)
    database.migrate(url)
    if json:
        emit_json({"topics_made": made, "partitions": settings.partitions})
    else:
        print(f"schema and roles are up to date; topics made: {', '.join(made) or 'none missing'}")


def worker() -> None:
    """Run a worker: consume, adapt, write.

    In the foreground; start any number of them. Needs the writer's login.

    Prints one line {"event": "ready", …} on stdout once it has partitions. SIGTERM finishes the batch and ends with 0;
    exit code 3 means that another worker took over its partitions; a supervisor starts it again after 1 or 3.

    \b
    Examples:
      innerloop worker
      INNERLOOP_DEVICE=cuda INNERLOOP_BATCH_EVENTS=8192 innerloop worker
    """
    from pipeline import worker as streaming
    from pipeline.settings import Settings

    raise typer.Exit(streaming.run(Settings.load()))


def monitor() -> None:
    """Run the monitor: find drift, decide, watch versions.

    In the foreground; one watches, others stand by. Needs the writer's login.

    Reads what the workers record of every prediction, exactly once, and asks for a new meta-training only where that
    pays: `innerloop drift explain` says why, or why not. Prints one line {"event": "ready", …} once it watches. SIGTERM
    ends it with 0; killed in any other way, it goes on where it was.

    \b
    Examples:
      innerloop monitor
      INNERLOOP_DRIFT_SECONDS=1 INNERLOOP_DRIFT_COST=200 innerloop monitor
    """
    from pipeline import monitor as watching
    from pipeline.settings import Settings

    raise typer.Exit(watching.run(Settings.load()))


def config(json: AsJson = False) -> None:
    """Show every setting and where it came from.

    Passwords are masked. Each setting is the variable INNERLOOP_<NAME>, or stands in the TOML file that
    INNERLOOP_CONFIG names. A name that innerloop does not know ends any command with exit code 78.

    \b
    Examples:
      innerloop config
      INNERLOOP_CONFIG=prod.toml innerloop config --json
    """
    from pipeline.settings import Settings

    settings = Settings.load()
    values, sources = settings.shown(), settings.sources()
    if json:
        emit_json(values)
        return
    # As one would write them: 0.5, not 0.5000.
    texts = {name: None if value is None else str(value) for name, value in values.items()}
    rows = [(name, texts[name], sources[name], Settings.model_fields[name].description) for name in values]
    print(columns(("setting", "value", "from", "meaning"), rows))


def demo(
    dataset: Annotated[Literal["ml-100k"], typer.Option(help="Real interactions to run on.")] = "ml-100k",
    home: Annotated[Path | None, typer.Option(help="Folder for everything; otherwise one that is deleted.")] = None,
    rate: Annotated[float, typer.Option(min=1, help="Events a second.")] = 250.0,
    seed: Annotated[int, typer.Option(help="Same seed, same figures (times aside).")] = 0,
    picture: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Draw the drift and its cure, .png or .html.")
    ] = None,
    json: AsJson = False,
) -> None:
    """See the whole loop work on real data.

    Takes about four minutes and stops by itself.

    Starts the embedded broker and database, meta-trains on the earliest users, streams the later users' events
    through Kafka, a worker and Postgres, and shows what adaptation earned. Then, on synthetic events, what articles
    mean changes: the monitor finds it, a new version is trained, judged and goes live.

    \b
    Examples:
      innerloop demo
      innerloop demo --home /tmp/loop --rate 1000 --picture drift.html
    """
    from pipeline import demo as loop

    raise typer.Exit(loop.run(dataset=dataset, home=home, rate=rate, seed=seed, picture=picture, as_json=json))
