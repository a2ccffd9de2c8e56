"""The command that forgets a user."""

# ruff: noqa: D301  # \b is click's mark for a paragraph that keeps its lines; a raw string would lose it
from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli_database import opened
from pipeline.cli_output import AsJson, emit_json


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(forget)


def forget(
    user: Annotated[str, typer.Argument(help="The user's id, known or not.", metavar="USER")], json: AsJson = False
) -> None:
    """Forget a user, for good.

    Needs the writer's login. The wish goes into the topic of erasures, where any worker reads it (programs of your own
    may send it as well), and is granted at once: support set, adapter, scores, event ids, seen items, the record of
    predictions and the contents of dead letters are deleted. A keyed hash stays, so that late events from before are
    dropped and counted; what happens afterwards belongs to a new user. Meta-training leaves out what came before.

    It cannot be undone, and is repeated by itself on a database restored from an older backup. Kafka's own log of
    interactions is not touched: trimming it is yours.

    \b
    Examples:
      innerloop forget u42
      innerloop forget u42 --json
    """
    from pipeline.erasures import Erasures, ask
    from pipeline.session import Session
    from pipeline.settings import Settings
    from schemas.fields import is_id

    if not is_id(user):
        raise typer.BadParameter("a user's id has 1 to 128 bytes and no control characters", param_hint="USER")
    settings = Settings.load()
    broker, engine = settings.broker_address(), opened(settings, "writer")
    topics = {"topic": settings.topic_erasures, "interactions": settings.topic_interactions}
    ask(broker, settings.topic_erasures, user)
    done = Erasures(Session(engine), broker, **topics).catch_up()
    if json:
        emit_json({"user_id": user, **vars(done)})
    else:
        print(
            f"forgotten; erased by this command: {done.users} states, {done.predictions:,} predictions, "
            f"{done.dead_letters:,} dead letters"
        )
