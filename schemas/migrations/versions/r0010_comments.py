"""Comments: what a team with nothing but a reader's login finds out in psql."""

from schemas.sql import run_sql_file

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Say of every table, view and function what it holds."""
    run_sql_file("0010_comments.sql")
