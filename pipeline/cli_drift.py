"""Commands about drift: status, explain, freeze, unfreeze."""

# ruff: noqa: D301  # \b is click's mark for a paragraph that keeps its lines; a raw string would lose it
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli_database import opened
from pipeline.cli_output import AsJson, columns, emit_json, say

if TYPE_CHECKING:
    from sqlalchemy import Engine

drift = typer.Typer(help="Drift: what the monitor sees, decides, and may do.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.add_typer(drift, name="drift")
    drift.command("status")(status)
    drift.command("explain")(explain)
    drift.command("freeze")(freeze)
    drift.command("unfreeze")(unfreeze)


def status(json: AsJson = False) -> None:
    """Show whether the stream is watched, what is open, and the newest verdict.

    Exit code 1 while nobody watches, or the monitor is blind: then no drift is found either.

    \b
    Examples:
      innerloop drift status
      innerloop drift status --json | jq .verdict
    """
    from pipeline import drift_reading

    engine, topic = _reader()
    with engine.connect() as connection:
        found = drift_reading.drift_status(connection, topic)
    if json:
        emit_json(found.as_json())
    else:
        print(f"monitor  {found.as_line()}")
        print(f"labels   {found.labels:,} of version {found.meta_version or '-'}")
        print(f"frozen   {found.frozen or 'no'}")
        if found.inputs:
            print(f"users    {drift_reading.mix_in_words(found.inputs)}")
        if not found.alive:
            say("innerloop: nobody watches the stream: run `innerloop monitor`")
    if not found.alive or found.blind:
        raise typer.Exit(1)


def explain(
    most: Annotated[int, typer.Option("--last", min=1, max=500, help="So many decisions.")] = 5,
    out: Annotated[Path | None, typer.Option(help="Draw it as well: a .png or .html file.", metavar="FILE")] = None,
    json: AsJson = False,
) -> None:
    """Tell the newest decisions in words: alarm, evidence, every threshold, verdict.

    The picture has the loss over time with and without adaptation, the changes that detectors found, the decisions, and
    when versions came into use. It needs the extra innerloop[report].

    \b
    Examples:
      innerloop drift explain
      innerloop drift explain --last 20 --out drift.png
    """
    from pipeline import drift_picture, drift_reading

    engine, topic = _reader()
    found = drift_reading.history(engine, topic)
    if out is not None:
        drift_picture.save(found, out)
    if json:
        emit_json(found.decisions[:most])
        return
    changes = [
        (f"{a['record_at']:%Y-%m-%d %H:%M:%S}", a["series"], "worse" if a["worse"] else "better",
         round(a["mean_after"] - a["mean_before"], 3))
        for a in found.alarms[:10]
    ]  # fmt: skip
    print("\n\n".join(map(drift_reading.in_words, found.decisions[:most])) or "no alarm has asked for a decision yet")
    if changes:
        print("\n" + columns(("changes found", "series", "", "standard deviations"), changes))
    if out is not None:
        say(f"drawn to {out}")


def freeze(why: Annotated[str, typer.Argument(help="Why, for the audit and for `explain`.", metavar="WHY")]) -> None:
    """Forbid retraining, and versions that go live by themselves, until `unfreeze`.

    Drift is still found, and decisions say that they wait; so do requests, challengers and canaries. What does worse
    is taken back all the same, and `innerloop models` does as it is told. Needs the writer's login; one row of the
    audit.

    \b
    Example:
      innerloop drift freeze "sale until Monday"
    """
    from pipeline import drift_reading

    if not drift_reading.freeze(_writer(), why, _actor()):
        say("innerloop: it is frozen already; `innerloop drift status` says why")
        raise typer.Exit(1)
    say("frozen: nothing is retrained or goes live by itself until `innerloop drift unfreeze`")


def unfreeze() -> None:
    """Allow retraining again.

    \b
    Example:
      innerloop drift unfreeze
    """
    from pipeline import drift_reading

    if not drift_reading.unfreeze(_writer(), _actor()):
        say("innerloop: nothing is frozen")
        raise typer.Exit(1)
    say("no longer frozen")


def _reader() -> tuple[Engine, str]:
    from pipeline.settings import Settings

    settings = Settings.load()
    return opened(settings, "reader"), settings.topic_interactions


def _writer() -> Engine:
    from pipeline.settings import Settings

    return opened(Settings.load(), "writer")


def _actor() -> str:
    from getpass import getuser

    try:
        return f"operator {getuser()}"
    except (KeyError, OSError):  # a container's account may have no name
        return "operator"
