"""How a meta version comes to be, goes live and is taken back: requests, statuses, audit."""

from schemas.sql import run_sql_file

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the requests, what a version's row says of its career, and the audit."""
    run_sql_file("0002_lifecycle.sql")
