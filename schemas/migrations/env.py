"""Alembic's entry: runs inside the connection and transaction that `schemas.database.migrate` opened."""

from alembic import context

from schemas.tables import SCHEMA, metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table_schema=SCHEMA,
)
context.run_migrations()
