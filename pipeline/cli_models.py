"""Commands about versions: models list, show, promote, rollback."""

# ruff: noqa: D301  # \b is click's mark for a paragraph that keeps its lines; a raw string would lose it
from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli_database import opened
from pipeline.cli_output import AsJson, columns, emit_json

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from pipeline.promotion import Watched
    from pipeline.versions import Change, Version

models = typer.Typer(
    help="Meta versions: what is live, where it came from, what was found about it.", no_args_is_help=True
)

Number = Annotated[int, typer.Argument(help="The version's number.", min=1, metavar="VERSION")]
Why = Annotated[str, typer.Option("--why", help="Why, for the audit.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.add_typer(models, name="models")
    models.command("list")(list_versions)
    models.command("show")(show)
    models.command("promote")(promote)
    models.command("rollback")(rollback)


def list_versions(json: AsJson = False) -> None:
    """List the versions, newest first.

    Status is challenger (not judged yet), canary (on trial on some partitions), live, retired (was live), or rejected.
    The gain is that of the paired test against the version that was live then, on events later than those it learnt
    from: loss per event, with its 95 % interval. "By" and "why" are of the status; who or what made a version live that
    no longer is stands last.

    \b
    Examples:
      innerloop models list
      innerloop models list --json
    """
    from pipeline import versions

    engine = _reader()
    found, made = versions.listed(engine), versions.promotions(engine)
    if json:
        promoted = {number: change.__dict__ for number, change in made.items()}
        emit_json([{**version.__dict__, "promoted": promoted.get(version.version)} for version in found])
        return
    headers = ("version", "status", "parent", "window", "gain [95 %]", "since", "by", "why", "was promoted by")
    print(
        columns(headers, [_row(version, made.get(version.version)) for version in found])
        if found
        else "no version: run `innerloop meta-train`"
    )


def show(version: Number, json: AsJson = False) -> None:
    """Show one version: where it came from, what was found about it, and its audit.

    \b
    Example:
      innerloop models show 3
    """
    from pipeline import versions

    engine = _reader()
    found = versions.shown(engine, version)
    audit = versions.history(engine, version)
    if json:
        emit_json({**found.__dict__, "audit": audit})
        return
    rows = [_field(name, value) for name, value in found.__dict__.items() if not isinstance(value, dict)]
    print(columns(("field", "value"), rows))
    for title, table in (("judgement", found.judgement), ("metrics", found.metrics), ("provenance", found.provenance)):
        if table:
            print("\n" + columns((title, ""), [(name, _figure(value)) for name, value in table.items()]))
    if audit:
        told = [
            (f"{row['at']:%Y-%m-%d %H:%M:%S}", row["actor"], row["action"], row["detail"].get("reason", ""))
            for row in audit
        ]
        print("\n" + columns(("at (UTC)", "by", "did", "why"), told))


def promote(
    version: Number,
    canary: Annotated[bool, typer.Option("--canary", help="On a share of the partitions first.")] = False,
    why: Why = "asked for by an operator",
    json: AsJson = False,
) -> None:
    """Make a version live, at once or after a trial.

    Its artefact is read first; one that is damaged or gone is refused. Workers change over within a second, each
    between two batches. With --canary the monitor decides how it goes on. Needs the writer's login.

    \b
    Examples:
      innerloop models promote 3 --canary --why "new catalogue"
      innerloop models promote 3
    """
    from pipeline import promotion
    from pipeline.settings import Settings

    on, change = _writer(), _by_operator(why)
    if canary:
        partitions = promotion.begin_canary(on, version, Settings.load().canary_share, change, {})
        told: dict[str, Any] = {"version": version, "status": "canary", "partitions": partitions}
        text = f"version {version} is a canary on partition {', '.join(map(str, partitions))}"
    else:
        replaced = promotion.go_live(on, version, change)
        told = {"version": version, "status": "live", "replaced": replaced}
        text = f"version {version} is live" + (f" in place of {replaced}" if replaced else "")
    emit_json(told) if json else print(text)


def rollback(
    to: Annotated[int | None, typer.Option(help="The version to return to; otherwise the one before.")] = None,
    why: Why = "asked for by an operator",
    json: AsJson = False,
) -> None:
    """Take the live version back: an earlier one is live again.

    The version taken back is rejected, and so is a canary beside it. Refused when the earlier version's artefact is
    damaged or gone. Needs the writer's login.

    \b
    Examples:
      innerloop models rollback --why "complaints since noon"
      innerloop models rollback --to 2
    """
    from pipeline import promotion, versions

    on = _writer()
    target = versions.before(on.engine) if to is None else to
    left = promotion.return_to(on, target, _by_operator(why))
    if json:
        emit_json({"version": target, "status": "live", "replaced": left})
    else:
        print(f"version {target} is live again, {left} is rejected")


def _reader() -> Engine:
    from pipeline.settings import Settings

    return opened(Settings.load(), "reader")


def _writer() -> Watched:
    from pipeline.artefacts import Artefacts
    from pipeline.promotion import Watched
    from pipeline.settings import Settings

    settings = Settings.load()
    engine = opened(settings, "writer")
    return Watched(engine, Artefacts(settings.artefacts_place()), settings.topic_interactions)


def _by_operator(why: str) -> Change:
    from getpass import getuser

    from pipeline.versions import Change

    try:
        name = getuser()
    except (KeyError, OSError):  # a container's account may have no name
        name = "unknown"
    return Change(f"operator {name}", why)


def _row(version: Version, made: Change | None) -> tuple[Any, ...]:
    gain = version.judgement.get("gain")
    shown = f"{gain[0]:+.4f} [{gain[1]:+.4f}, {gain[2]:+.4f}]" if gain else None
    window = None
    if version.window_from_ms is not None and version.window_to_ms is not None:
        window = " … ".join(_minute(ms) for ms in (version.window_from_ms, version.window_to_ms))
    since = f"{version.changed_at:%Y-%m-%d %H:%M:%S}"
    promoted = f"{made.by}: {made.reason}" if made and version.status != "live" else None
    status = since, version.changed_by, version.reason
    return version.version, version.status, version.parent, window, shown, *status, promoted


def _field(name: str, value: Any) -> tuple[str, Any]:
    if not name.endswith("_ms"):
        return name, value
    return f"{name.removesuffix('_ms')} (UTC)", None if value is None else _minute(value)


def _minute(epoch_ms: int) -> str:
    from datetime import UTC, datetime

    return f"{datetime.fromtimestamp(epoch_ms / 1000, UTC):%Y-%m-%d %H:%M}"


def _figure(value: Any) -> Any:
    return ", ".join(f"{name} {inner}" for name, inner in value.items()) if isinstance(value, dict) else value
