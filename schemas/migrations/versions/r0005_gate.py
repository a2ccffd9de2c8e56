"""The acceptance gate per user: what an adapter has earned lately, and whether it is served."""

from schemas.sql import run_sql_file

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the gate's columns, its count, and a `recommend` that says what was served."""
    run_sql_file("0005_gate.sql")
