"""Popularity takes effect sooner; what is saved keeps its form."""

from schemas.sql import run_sql_file

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Say how often counts move."""
    run_sql_file("0013_popularity.sql")
