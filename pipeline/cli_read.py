"""Commands that read what the workers wrote: recommend, status, metrics, dead-letters."""

# ruff: noqa: D301  # \b is click's mark for a paragraph that keeps its lines; a raw string would lose it
from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli_database import opened, reader_of
from pipeline.cli_output import AsJson, columns, emit_json, say

if TYPE_CHECKING:
    from pipeline.dead_letters import Selection
    from pipeline.reading import Status

letters = typer.Typer(help="Events that could not be applied: list them, replay them.", no_args_is_help=True)

Topic = Annotated[str | None, typer.Option(help="Only of this topic.")]
Reason = Annotated[str | None, typer.Option(help="Only with this reason code, as in BAD_TYPE.")]
Partition = Annotated[int | None, typer.Option(min=0, help="Only of this partition.")]
Offset = Annotated[int | None, typer.Option(min=0, help="Only the one at this offset.")]
Since = Annotated[
    datetime | None,
    typer.Option(help="Only those first seen since then (UTC).", formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"]),
]


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(recommend)
    app.command()(status)
    app.command()(metrics)
    app.add_typer(letters, name="dead-letters")
    letters.command("list")(list_letters)
    letters.command("replay")(replay_letters)


def recommend(
    user: Annotated[str, typer.Argument(help="The user's id, known or not.", metavar="USER")],
    k: Annotated[int, typer.Option("-k", "--k", min=1, max=1000, help="How many items.")] = 10,
    json: AsJson = False,
) -> None:
    """Show the best items for a user.

    Any SQL client gets the same, see the last example.

    `source` says where a line comes from: `adapted` (the inner loop has learnt from this user), `start` (conditioned on
    the user's events, nothing learnt yet) or `popular` (the list for users without events).

    \b
    Examples:
      innerloop recommend u42
      innerloop recommend u42 -k 50 --json
      psql "$INNERLOOP_DATABASE_URL" -c "SELECT * FROM innerloop.recommend('u42', 10)"
    """
    from pipeline import reading
    from pipeline.settings import Settings

    found = reading.recommend(opened(Settings.load(), "reader"), user, k)
    if json:
        emit_json([item.__dict__ for item in found])
    elif found:
        rows = [(i.rank, i.item_id, i.score, i.source, (i.text or "")[:60]) for i in found]
        print(columns(("rank", "item_id", "score", "source", "text"), rows))
    else:
        say("innerloop: the catalogue is empty; feed it with `innerloop items FILE` while a worker runs")


def status(
    worker: Annotated[
        bool, typer.Option("--worker", help="Say whether the workers and trainers of this machine are alive.")
    ] = False,
    json: AsJson = False,
) -> None:
    """Show the law of the stream, lag and freshness.

    The law, exact at any moment: next - first = applied + dead-lettered + duplicates + dropped + skipped. A broken
    law ends the command with exit code 1. Freshness is Kafka's timestamp to the scores' transaction, last minute.

    With --worker nothing is asked but the pulse of the workers and trainers that run on this machine with this
    INNERLOOP_HOME: exit code 1 when there is none, or one has got nothing done for 30 seconds. For health checks.

    \b
    Examples:
      innerloop status
      innerloop status --json | jq .lag
      innerloop status --worker
    """
    from pipeline import reading
    from pipeline.settings import Settings

    settings = Settings.load()
    if worker:
        return _pulse(settings.home, json=json)
    found = reading.status(*reader_of(settings))
    if json:
        emit_json(found.as_json())
    else:
        _print_status(found)
    if found.broken:
        raise typer.Exit(1)


def metrics(
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 9464,
    once: Annotated[bool, typer.Option("--once", help="Print them once, and serve nothing.")] = False,
) -> None:
    """Serve the state of the stream to Prometheus.

    One process for a deployment, a reader's login is enough. Every scrape asks the database and the broker anew; while
    the database is away it finds `innerloop_up 0`. Prints the address, ends with SIGTERM.

    Worth an alert: innerloop_up == 0, innerloop_law_broken == 1, innerloop_lag, innerloop_freshness_seconds,
    innerloop_monitor_alive == 0, innerloop_monitor_blind == 1, rate(innerloop_events_total{fate="dead_lettered"}[5m]).

    \b
    Examples:
      innerloop metrics
      innerloop metrics --host 0.0.0.0 --port 9100
      innerloop metrics --once | grep innerloop_lag
    """
    from pipeline import exposition
    from pipeline.settings import Settings

    collector = exposition.StreamCollector(*reader_of(Settings.load()))
    if once:
        print(exposition.text_of(collector), end="")
        return
    raise typer.Exit(exposition.serve(collector, host, port))


def _pulse(home: Path, *, json: bool) -> None:
    from pipeline.heartbeat import pulses

    found = pulses(home)
    if json:
        emit_json(
            [{"process_id": pulse.process_id, "seconds": pulse.seconds, "alive": not pulse.stale} for pulse in found]
        )
    elif found:
        rows = [(pulse.process_id, pulse.seconds, "HANGS" if pulse.stale else "alive") for pulse in found]
        print(columns(("process", "last beat, seconds ago", "state"), rows))
    else:
        say(f"innerloop: no worker and no trainer runs on this machine with INNERLOOP_HOME={home}")
    if not found or any(pulse.stale for pulse in found):
        raise typer.Exit(1)


def _print_status(found: Status) -> None:
    from schemas.stream_tables import FATES

    shown = ("partition", "first_offset", "next_offset", *FATES)
    headers = ("partition", "first", "next", "applied", "dead", "duplicates", "dropped", "skipped", "lag", "law")
    rows = [(*(getattr(p, name) for name in shown), p.lag, "BROKEN" if p.broken else "holds") for p in found.partitions]
    print(
        columns(headers, rows)
        if rows
        else f"no worker has taken a partition of {found.topic} yet: run `innerloop worker`"
    )
    fresh = found.freshness
    print(f"lag           {'unknown (broker: ' + found.broker + ')' if found.lag is None else f'{found.lag:,}'}")
    print(
        f"freshness     p50 {fresh.p50_ms:.0f} ms, p99 {fresh.p99_ms:.0f} ms ({fresh.num_events:,} events)"
        if fresh
        else "freshness     no events in the last minute"
    )
    held = found.adapters
    print(f"adapters      {held.users:,} users, {held.gated:,} served from the start, {held.diverged:,} diverged")
    live = f"{found.live_version} since {found.live_since:%Y-%m-%d %H:%M:%S} UTC" if found.live_since else "none"
    print(f"live version  {live}{'' if found.live_version else ': run `innerloop meta-train`'}")
    print(f"dead letters  {found.dead_letters:,}, {found.dead_letters_open:,} of them not replayed")
    hint = ": run `innerloop monitor`" if found.monitor == "absent" else ""
    print(f"monitor       {found.monitor}{hint}")


def list_letters(
    reason: Reason = None,
    topic: Topic = None,
    partition: Partition = None,
    offset: Offset = None,
    since: Since = None,
    replayed: Annotated[bool, typer.Option(help="Those already replayed as well.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="The newest so many.")] = 50,
    json: AsJson = False,
) -> None:
    """List events that could not be applied.

    Newest first, with the reason. What they carried needs the writer's rights.

    \b
    Examples:
      innerloop dead-letters list
      innerloop dead-letters list --reason BAD_TYPE --since 2025-06-01 --json
    """
    from pipeline import dead_letters
    from pipeline.settings import Settings

    engine = opened(Settings.load(), "reader")
    selection = _selection(topic, reason, partition, offset, since)
    found = dead_letters.listed(engine, selection, limit=limit, include_replayed=replayed)
    if json:
        emit_json(found)
        return
    shown = ("topic", "partition", "offset", "reason", "detail", "first_seen", "replayed_at")
    print(
        columns(shown, [[_short(letter[name]) for name in shown] for letter in found]) if found else "no dead letters"
    )
    counts = dead_letters.counted(engine, selection)
    if counts:
        say("not replayed: " + ", ".join(f"{count:,} {reason}" for reason, count in counts.items()))


def replay_letters(
    reason: Reason = None,
    topic: Topic = None,
    partition: Partition = None,
    offset: Offset = None,
    since: Since = None,
    every: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many.")] = None,
    json: AsJson = False,
) -> None:
    """Produce dead letters again, each once.

    They get a new offset of their partition. Needs the writer's login.

    Replay after the cause is repaired (an upgrade that knows the version, a corrected mapping); otherwise the same
    event becomes a dead letter again. A second call changes nothing.

    \b
    Examples:
      innerloop dead-letters replay --reason UNKNOWN_VERSION
      innerloop dead-letters replay --topic interactions --partition 3 --offset 1207
      innerloop dead-letters replay --all
    """
    from pipeline import dead_letters
    from pipeline.settings import Settings

    if not every and not any((reason, topic, since, partition is not None, offset is not None)):
        raise typer.BadParameter("say which: --reason, --topic, --partition, --offset, --since or --all")
    settings = Settings.load()
    broker, engine = settings.broker_address(), opened(settings, "writer")
    done = dead_letters.replay(engine, broker, _selection(topic, reason, partition, offset, since), limit=limit)
    if json:
        emit_json(done.__dict__)
    else:
        lost = f", {done.incomplete:,} left: larger than the 64 KiB that are kept" if done.incomplete else ""
        print(f"{done.replayed:,} replayed{lost}{f', {done.failed:,} not delivered' if done.failed else ''}")
    if done.failed:
        raise typer.Exit(1)


def _selection(
    topic: str | None, reason: str | None, partition: int | None, offset: int | None, since: datetime | None
) -> Selection:
    from pipeline.dead_letters import Selection

    return Selection(topic, reason, partition, offset, since.replace(tzinfo=UTC) if since else None)


def _short(value: object) -> object:
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%d %H:%M:%S")
    return value[:70] if isinstance(value, str) else value
