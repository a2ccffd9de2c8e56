"""Commands that put something into Kafka: produce, items."""

# ruff: noqa: D301  # \b is click's mark for a paragraph that keeps its lines; a raw string would lose it
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pipeline.cli_output import AsJson, emit_json, say

if TYPE_CHECKING:
    from pipeline.feeding import Fed

Format = Annotated[
    Literal["jsonl", "csv"] | None, typer.Option("--format", help="What the file is; otherwise its name decides.")
]
File = Annotated[str, typer.Argument(help="A file, also gzipped, or - for standard input.", metavar="FILE|-")]
Limit = Annotated[int | None, typer.Option(min=1, help="Stop after so many lines.")]
Rate = Annotated[float | None, typer.Option(min=0.001, help="At most so many records a second.")]
SpeedUp = Annotated[
    float | None, typer.Option(min=0.001, metavar="X", help="Replay event time, X times as fast as it was.")
]
MappingFile = Annotated[Path | None, typer.Option(help="TOML file that maps foreign JSON onto the contract.")]
PassThrough = Annotated[bool, typer.Option("--pass-through", help="Send JSON lines as they are, whatever they are.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(produce)
    app.command()(items)


def produce(
    file: File,
    rate: Rate = None,
    speed_up: SpeedUp = None,
    mapping: MappingFile = None,
    limit: Limit = None,
    format: Format = None,
    pass_through: PassThrough = False,
    json: AsJson = False,
) -> None:
    """Feed interactions into Kafka, keyed by their user.

    Each line is checked by the decoder that the worker uses. A line that could never be applied is named on standard
    error and left out, the rest is sent, and the command ends with exit code 1.

    \b
    JSON Lines: {"user_id": "u1", "item_id": "i9", "type": "click", "ts": "2025-06-01T12:00:00Z"}
    CSV:        user_id,item_id,type,ts,value      (ts in epoch milliseconds or RFC 3339)

    A line without an event_id gets one from its content and number, so feeding the same file twice applies it once.
    With --mapping, `event_id = "line_id"` under [fields] takes that id for foreign events that have none.

    \b
    Examples:
      innerloop produce clicks.jsonl.gz
      innerloop produce clicks.csv --rate 500
      innerloop produce yesterday.jsonl --speed-up 60
      zcat segment.json.gz | innerloop produce - --mapping segment.toml
    """
    if pass_through and (mapping or format == "csv"):
        raise typer.BadParameter(
            "lines that are passed through are neither mapped nor CSV", param_hint="--pass-through"
        )
    from functools import partial

    from pipeline.feeding import feed
    from pipeline.lines import open_source
    from pipeline.produce import Pace, interaction_record, raw_record
    from pipeline.settings import Settings
    from schemas.mapping import load_mapping

    translation = load_mapping(mapping) if mapping else None
    convert = raw_record if pass_through else partial(interaction_record, mapping=translation)
    settings = Settings.load()
    broker, topic, pace = settings.broker_address(), settings.topic_interactions, Pace(rate, speed_up)
    with open_source(file, format) as source:
        _report(feed(broker, topic, source, convert, pace=pace, limit=limit), json, wanted=EVENT_FIELDS)


def items(file: File, rate: Rate = None, limit: Limit = None, format: Format = None, json: AsJson = False) -> None:
    """Feed the catalogue into Kafka, one line per item.

    `text` is what the encoder reads. Without it, the columns title, name, description, brand, category, genres and
    tags make it. Other columns become attributes. `available: false` withdraws an item; a later line replaces an
    earlier one.

    \b
    JSON Lines: {"item_id": "i9", "text": "Red running shoes, light", "attributes": {"price": 89}}
    CSV:        item_id,title,genres,available

    \b
    Examples:
      innerloop items catalogue.jsonl
      innerloop items catalogue.csv.gz
    """
    from pipeline.catalogue_feed import item_record
    from pipeline.feeding import feed
    from pipeline.lines import open_source
    from pipeline.produce import Pace
    from pipeline.settings import Settings

    settings = Settings.load()
    with open_source(file, format) as source:
        fed = feed(settings.broker_address(), settings.topic_items, source, item_record, pace=Pace(rate), limit=limit)
    _report(fed, json, wanted=ITEM_FIELDS)


EVENT_FIELDS = "an event needs user_id, item_id, type and ts; --mapping FILE.toml says where yours are found"
ITEM_FIELDS = "an item needs item_id and a text: title, description and the like, see --help"


def _report(fed: Fed, json: bool, *, wanted: str) -> None:
    """Print how it went; where no line at all was good, also what such lines look like."""
    if json:
        emit_json(fed.as_json())
    else:
        refused = f", {fed.malformed:,} malformed" if fed.malformed else ""
        lost = f", {fed.failed:,} not delivered" if fed.failed else ""
        print(f"{fed.sent:,} sent to {fed.topic} in {fed.seconds:.1f} s{refused}{lost}")
    if not fed.complete:
        mend = f"; {wanted}" if fed.malformed and not fed.sent else ""
        say(f"innerloop: not every line was sent; the lines are named above{mend}")
        raise typer.Exit(1)
