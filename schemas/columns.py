"""Columns that the tables are made of: types, and the few kinds of column that repeat."""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, Boolean, Column, DateTime, Double, Integer, MetaData, SmallInteger, Text, func, text
from sqlalchemy.dialects.postgresql import ARRAY, REAL

SCHEMA = "innerloop"
metadata = MetaData(schema=SCHEMA)

INT2S, INT4S, INT8S, BOOLS = ARRAY(SmallInteger), ARRAY(Integer), ARRAY(BigInteger), ARRAY(Boolean)
FLOAT4S, FLOAT8S, TEXTS = ARRAY(REAL), ARRAY(Double), ARRAY(Text)
ID_TEXT = Text(collation="C")


def required(name: str, kind: Any, default: Any = None) -> Column[Any]:
    """A column that is never null."""
    return Column(name, kind, nullable=False, server_default=default)


def array(name: str, kind: ARRAY[Any]) -> Column[Any]:
    """An array, empty by default."""
    return required(name, kind, text("'{}'"))


def stamp(name: str) -> Column[Any]:
    """When the transaction that wrote the row began."""
    return required(name, DateTime(timezone=True), func.now())


def clock(name: str) -> Column[Any]:
    """When the row itself was written."""
    return required(name, DateTime(timezone=True), func.clock_timestamp())


def of_partition() -> tuple[Column[Any], Column[Any]]:
    """The key of what a partition of a topic has one of."""
    return Column("topic", Text, primary_key=True), Column("partition", Integer, primary_key=True, autoincrement=False)
