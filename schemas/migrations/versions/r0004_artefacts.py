"""Artefacts under way, and the maps that carry users' states from version to version."""

from schemas.sql import run_sql_file

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the two tables."""
    run_sql_file("0004_artefacts.sql")
