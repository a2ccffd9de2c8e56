"""The prequential record: event time, new items and scenes beside the losses, and what else was applied."""

from schemas.sql import run_sql_file

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Widen the record, and let a user's elements be taken out of it."""
    run_sql_file("0003_record.sql")
