"""Item pairs counted online: a snapshot per partition, and the log since."""

from schemas.sql import run_sql_file

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the snapshots of pairs and their log."""
    run_sql_file("0007_pairs.sql")
