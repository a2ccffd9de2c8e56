"""Commands that make versions: meta-train, trainer."""

# ruff: noqa: D301  # \b is click's mark for a paragraph that keeps its lines; a raw string would lose it
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pipeline.cli_output import AsJson, emit_json

if TYPE_CHECKING:
    from models.learner_tuning import Method

# Spelt out, because importing torch to list them would take seconds; a test compares them with the models'.
Learners = Literal["honest", "ridge", "maml", "fomaml", "anil", "reptile", "meta-sgd"]
Adapters = Literal["vector", "lora", "bottleneck"]
Residuals = Literal["honest", "events", "support"]

METHODS = """
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
"""


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command("meta-train", epilog=METHODS)(meta_train)
    app.command()(trainer)


def meta_train(
    interactions: Annotated[
        str | None, typer.Argument(help="Events as for `produce` (JSON Lines or CSV, also gzipped).", metavar="FILE")
    ] = None,
    from_topic: Annotated[bool, typer.Option("--from-topic", help="Take the events from Kafka instead.")] = False,
    items: Annotated[
        str | None, typer.Option(help="Catalogue as for `items`; otherwise the topic of items is read.")
    ] = None,
    mapping: Annotated[Path | None, typer.Option(help="TOML file that maps foreign JSON onto the contract.")] = None,
    learner: Annotated[Learners, typer.Option(help="How a user is adapted; see below.")] = "honest",
    adapter: Annotated[Adapters, typer.Option(help="What a gradient learner adapts; see below.")] = "vector",
    residuals: Annotated[Residuals, typer.Option(help="What a learner learns from; see below.")] = "honest",
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
    Examples:
      innerloop meta-train history.jsonl.gz --items catalogue.jsonl
      innerloop meta-train --from-topic --learner fomaml --adapter vector
    """
    if (interactions is None) == (not from_topic):
        raise typer.BadParameter("give either a file of interactions or --from-topic")
    method = _method(learner, adapter, residuals)
    from pipeline import meta_training
    from pipeline.settings import Settings

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


def _method(learner: Learners, adapter: Adapters, residuals: Residuals) -> Method:
    from models.learner_tuning import Method

    try:
        return Method(learner, adapter, residuals).checked()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


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
