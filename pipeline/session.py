"""One connection to the database: its limits, its transactions, and which of its failures pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg2
import psycopg2.extensions
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

# Failures that pass: waiting and trying again is right, a dead letter never is.
_PASSING_CODES = {
    "40001", "40P01", "55P03", "57014", "57P01", "57P02", "57P03", "25006", "25P03", "53100", "53200", "53300", "53400",
}  # fmt: skip
# A stopped process must not keep its row locks; a waiting one must not wait for ever.
SESSION = "-c idle_in_transaction_session_timeout=3000 -c lock_timeout=2000"


class StoreUnavailable(Exception):
    """The database is away, read-only, full or locked: keep the batch, wait, and try again."""


class Fenced(Exception):
    """Another worker has moved the position: forget the partition and stop, the restart reads the truth."""


class RowRefused(Exception):
    """A row violates a constraint of the database, or holds a value it has no room for: leave its record out."""


class Session:
    """A connection, opened when needed and prepared by a statement, if any; not shared between threads."""

    def __init__(self, engine: Engine, prepare: str | None = None) -> None:
        self._engine, self._prepare = engine, prepare
        self._connection: Any = None

    @contextmanager
    def transaction(self) -> Iterator[psycopg2.extensions.cursor]:
        """One transaction, committed at the end of the block.

        Failures that pass become StoreUnavailable, rows that can never be written RowRefused.
        """
        try:
            if self._connection is None:
                self._connection = self._open()
            yield self._connection.cursor()
            self._connection.commit()
        except (psycopg2.Error, DBAPIError) as error:
            self.close()
            cause = error.orig if isinstance(error, DBAPIError) else error
            if isinstance(cause, psycopg2.IntegrityError | psycopg2.DataError):
                raise RowRefused(_sentence(cause)) from error
            if not isinstance(cause, psycopg2.Error) or not _passes(cause):
                raise
            raise StoreUnavailable(str(cause).strip().split("\n")[0]) from error
        except BaseException:
            self.close()
            raise

    def _open(self) -> Any:
        connection = self._engine.raw_connection()
        if self._prepare:
            connection.cursor().execute(self._prepare)
            connection.commit()
        return connection

    def close(self) -> None:
        """Drop the connection, and with it any open transaction."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.invalidate()


def _passes(error: psycopg2.Error) -> bool:
    return error.pgcode in _PASSING_CODES or isinstance(error, psycopg2.OperationalError | psycopg2.InterfaceError)


def _sentence(error: psycopg2.Error) -> str:
    # PostgreSQL's own sentence may quote the row.
    diagnosis = error.diag
    place = diagnosis.constraint_name or diagnosis.column_name or "a value"
    return f"{place} of {diagnosis.table_name or 'a row'} refuses it ({type(error).__name__}, {error.pgcode})"
