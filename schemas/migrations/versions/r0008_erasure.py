"""Users who asked to be forgotten: what stays of them, and the functions that take everything else away."""

from schemas.sql import run_sql_file

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the tables of erased users, and the functions that a worker's login forgets by."""
    run_sql_file("0008_erasure.sql")
