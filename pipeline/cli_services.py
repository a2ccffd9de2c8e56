"""Commands for the embedded broker and database: services up, down, status."""

# ruff: noqa: D301  # \b is click's mark for a paragraph that keeps its lines; a raw string would lose it
from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli_output import AsJson, columns, emit_json, say

services = typer.Typer(help="The embedded broker and database, for development.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.add_typer(services, name="services")
    services.command("up")(up)
    services.command("down")(down)
    services.command("status")(services_status)


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
