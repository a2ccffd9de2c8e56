"""Readers may read what a list is made of: item counts and pairs, which name nobody."""

from schemas.sql import run_sql_file

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Let `innerloop explain` work with a reader's login."""
    run_sql_file("0011_explain.sql")
