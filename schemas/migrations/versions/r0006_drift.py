"""What the drift monitor remembers, finds and decides, and the record's hours once its rows have gone."""

from schemas.sql import run_sql_file

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make its tables, and the function that turns old rows of the record into hours."""
    run_sql_file("0006_drift.sql")
