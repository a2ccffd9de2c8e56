"""Commands that set up and run: migrate, services, meta-train, worker, config, demo."""

# ruff: noqa: D301  # \b is click's mark for a paragraph that keeps its lines; a raw string would lose it
from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.cli_output import AsJson, columns, emit_json, say

# Spelt out, because importing torch to list them would take seconds; a test compares them with the models'.
Learners = Literal["honest", "ridge", "maml", "fomaml", "anil", "reptile", "meta-sgd"]
Adapters = Literal["vector", "lora", "bottleneck"]
Residuals = Literal["honest", "events", "support"]

services = typer.Typer(help="The embedded broker and database, for development.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(demo)
    app.add_typer(services, name="services")
    services.command("up")(up)
    services.command("down")(down)
    services.command("status")(services_status)
    app.command()(migrate)
    app.command("meta-train")(meta_train)
    app.command()(worker)
    app.command()(trainer)
    app.command()(monitor)
    app.command()(config)


def up(json: AsJson = False) -> None:
    """Start the embedded broker and database.

    Tansu and PostgreSQL run in INNERLOOP_HOME and outlive this command. The broker keeps its log in memory only;
    nothing listens outside this machine.

    \b
    Example:
      innerloop services up && innerloop migrate
    """
    from pipeline import services as embedded
    from pipeline.settings import Settings

    endpoints = embedded.up(Settings.load().home)
    if json:
        emit_json(endpoints.__dict__)
    else:
        print(columns(("part", "where"), list(endpoints.__dict__.items())))


def down(
    delete: Annotated[bool, typer.Option(help="Delete the database's data as well.")] = False,
) -> None:
    """Stop the embedded broker and database.

    \b
    Example:
      innerloop services down --delete
    """
    from pipeline import services as embedded
    from pipeline.settings import Settings

    embedded.down(Settings.load().home, delete=delete)
    say("the embedded broker and database are stopped")


def services_status(json: AsJson = False) -> None:
    """Show which embedded parts run, and where.

    Exit code 1 when one does not.

    \b
    Example:
      innerloop services status --json
    """
    from pipeline import services as embedded
    from pipeline.settings import Settings

    found = embedded.status(Settings.load().home)
    if json:
        emit_json([part.__dict__ for part in found])
    else:
        rows = [(part.name, part.address or "not running", part.pid, part.log_file) for part in found]
        print(columns(("part", "where", "pid", "log"), rows))
    if any(part.address is None for part in found):
        raise typer.Exit(1)


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


def meta_train(
    interactions: Annotated[
        str | None, typer.Argument(help="Events as for `produce` (JSON Lines or CSV, also gzipped).", metavar="[FILE]")
    ] = None,
    from_topic: Annotated[bool, typer.Option("--from-topic", help="Take the events from Kafka instead.")] = False,
    items: Annotated[
        str | None, typer.Option(help="Catalogue as for `items`; otherwise the topic of items is read.")
    ] = None,
    mapping: Annotated[Path | None, typer.Option(help="TOML file that maps foreign JSON onto the contract.")] = None,
    learner: Annotated[Learners, typer.Option(help="How a user is adapted; see above.")] = "honest",
    adapter: Annotated[Adapters, typer.Option(help="What a gradient learner adapts; see above.")] = "vector",
    residuals: Annotated[Residuals, typer.Option(help="What a learner learns from; see above.")] = "honest",
    recipe: Annotated[
        str | None, typer.Option(help="Hyperparameters by `innerloop search`: their name, or a .toml file.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything random in training.")] = 0,
    json: AsJson = False,
) -> None:
    """Learn meta-parameters from past interactions.

    They are registered as a version, which needs the writer's login. Fitted on the earlier users, validated
    prequentially on users it has not seen; what does not pay there is switched off, the inner loop included. The first
    version becomes live, later ones are challengers.

    \b
    Learners:
      honest    one MAP step with a shared metric; nothing to fit, the default
      ridge     the same solve, with a precision learnt for every factor
      maml      five gradient steps from a learnt beginning, differentiated through
      fomaml    the same to first order: faster to train
      anil      maml, with the adapter's last layer alone adapted
      reptile   the beginning moves to where the steps end; no query is looked at
      meta-sgd  maml with step sizes learnt for every parameter and step

    \b
    Adapters, all served as one vector a user, so that they cost the same:
      vector      the user's vector itself
      lora        a low-rank update of the map from what she took to her vector
      bottleneck  a small network on what she took

    \b
    Residuals:
      honest   errors of predictions made before each event, all of them, kept as one vector a user
      events   the same for her last ten events one by one, recomputed against 40 other items: slow to serve
      support  what the start errs now about her last ten, though it has used them: usual, and gains least

    `python -m tests.benchmarks learners` in a checkout compares them. Gradient learners stop early on users of their
    own; the figure that decides is made on users that neither moved nor stopped them.

    \b
    Examples:
      innerloop meta-train history.jsonl.gz --items catalogue.jsonl
      innerloop meta-train --from-topic --learner fomaml --adapter vector
    """
    if (interactions is None) == (not from_topic):
        raise typer.BadParameter("give either a file of interactions or --from-topic")
    from models.learner_tuning import Method
    from pipeline import meta_training
    from pipeline.settings import Settings

    try:
        method = Method(learner, adapter, residuals).checked()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    settings = Settings.load()
    trained = meta_training.run(
        settings,
        interactions_file=interactions,
        items_file=items,
        mapping_file=mapping,
        seed=seed,
        method=method,
        recipe=meta_training.recipe_named(settings, recipe),
    )
    if json:
        emit_json(trained.as_json())
    else:
        print(trained.as_text())


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


def trainer(
    once: Annotated[bool, typer.Option("--once", help="End when nothing is left to do; for cron.")] = False,
) -> None:
    """Run a trainer: requests become challengers, challengers canaries.

    In the foreground; start any number of them, one works on a request. Needs the writer's login.

    For a request (the monitor makes them) it tries earlier versions first; if none fits again, it meta-trains on the
    request's window of the topic, beginning from the live version, without users who asked to be forgotten. A
    challenger is judged against the live version on later events, both replayed by the worker's own code; one that is
    shown to be better, and worse in no segment, becomes a canary. `innerloop models list` tells how it went.

    Prints one line {"event": "ready", …} on stdout. SIGTERM gives the request in hand back and ends with 0; killed, its
    request is taken over by another trainer within a minute.

    \b
    Examples:
      innerloop trainer
      innerloop trainer --once
    """
    from pipeline import trainer as training
    from pipeline.settings import Settings

    raise typer.Exit(training.run(Settings.load(), once=once))


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
    rows = [(name, value, sources[name], Settings.model_fields[name].description) for name, value in values.items()]
    print(columns(("setting", "value", "from", "meaning"), rows))


def demo(
    dataset: Annotated[Literal["ml-100k"], typer.Option(help="Real interactions to run on.")] = "ml-100k",
    home: Annotated[Path | None, typer.Option(help="Folder for everything; otherwise one that is deleted.")] = None,
    rate: Annotated[float, typer.Option(min=1, help="Events a second.")] = 250.0,
    seed: Annotated[int, typer.Option(help="Same seed, same figures (times aside).")] = 0,
    drift: Annotated[
        bool, typer.Option("--drift/--no-drift", help="A change of taste and its cure at the end.")
    ] = True,
    json: AsJson = False,
) -> None:
    """See the whole loop work on real data.

    Takes about three minutes and stops by itself.

    Starts the embedded broker and database, meta-trains on the earliest users, streams the later users' events
    through Kafka, a worker and Postgres, and shows what adaptation earned.

    \b
    Examples:
      innerloop demo
      innerloop demo --home /tmp/loop --rate 1000
    """
    from pipeline import demo as loop

    raise typer.Exit(loop.run(dataset=dataset, home=home, rate=rate, seed=seed, drift=drift, as_json=json))
