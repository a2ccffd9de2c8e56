"""SQL kept as SQL: the files beside this module, each belonging to the revision that its name begins with."""

from importlib.resources import files

from alembic import op


def run_sql_file(name: str) -> None:
    """Run one file of this package, many statements at once, in the migration's transaction."""
    statements = files(__name__).joinpath(name).read_text(encoding="utf-8")
    # Without parameters the driver leaves every '%' of the file alone.
    op.get_bind().exec_driver_sql(statements, execution_options={"no_parameters": True})
