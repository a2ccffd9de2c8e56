"""How commands open the database: by the login that they need, on this code's schema."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from pipeline.settings import Role, Settings


def opened(settings: Settings, role: Role) -> Engine:
    """Connect as `role`. Raises SchemaMismatch on another schema, WrongRole where a writer's login is not one."""
    from schemas.database import check_role, check_schema, connect_engine

    engine = connect_engine(settings.database(role))
    check_schema(engine)
    if role == "writer":
        check_role(engine, role)
    return engine


def reader_of(settings: Settings) -> tuple[Engine, str | None, str]:
    """Open what the stream's state is read from: database, broker where there is one, topic of interactions."""
    broker = settings.broker if settings.database_url else settings.broker_address()
    return opened(settings, "reader"), broker, settings.topic_interactions
