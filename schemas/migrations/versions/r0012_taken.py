"""When items were taken, beside their pairs: the pace at which a new item's takers come."""

from schemas.sql import run_sql_file

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the times to the snapshots, and drop what versions that are refused have counted."""
    run_sql_file("0012_taken.sql")
