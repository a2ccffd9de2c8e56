"""Alembic's script folder, shipped inside the package; `schemas.database.migrate` runs it."""
