"""The first tables, views, functions and grants."""

from schemas.sql import run_sql_file

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create everything inside the schema, which `migrate` has made before."""
    for part in ("tables", "views", "functions", "grants"):
        run_sql_file(f"0001_{part}.sql")
