"""Users who send too much, and workers whose settings differ."""

from schemas.sql import run_sql_file

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add what a rate limit remembers of users and partitions, and the settings that workers are run with."""
    run_sql_file("0009_faults.sql")
