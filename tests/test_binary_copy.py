"""The binary COPY stream, read back by the server that it is meant for."""

from __future__ import annotations

import io
from contextlib import closing

import numpy as np
import psycopg2

from pipeline.binary_copy import (
    BOOL,
    FLOAT4,
    FLOAT8,
    INT2,
    INT4,
    INT8,
    Column,
    Ragged,
    Scalar,
    binary_copy,
    text,
    text_array,
)
from tests.conftest import Database


def test_every_kind_of_column_comes_back_as_it_went(database: Database) -> None:
    draw = np.random.default_rng(0)
    names = ["a", "ünïcode ✓", "x" * 128, "'; DROP TABLE items; --"]
    integers = draw.integers(-(2**31), 2**31, (4, 5))
    reals = draw.normal(size=(4, 3))
    lengths = np.array([5, 0, 2, 1])
    columns: list[Column] = [
        text(names),
        Scalar(np.array([1, -2, 3, 2**31 - 1]), INT4),
        Scalar(np.array([2**62, -(2**62), 0, 7]), INT8),
        Ragged(integers, lengths, INT4),
        Ragged(integers, lengths, INT8, right=True),
        Ragged(integers % 100, lengths, INT2),
        Ragged(reals, np.full(4, 3), FLOAT8),
        Ragged(reals, np.full(4, 3), FLOAT4),
        text_array([["p", "ä"], [], [""], ["long" * 50]]),
        Ragged(integers % 2 == 0, lengths, BOOL),
    ]
    with closing(psycopg2.connect(database.writer_url)) as connection, connection.cursor() as cursor:
        cursor.execute(
            "CREATE TEMPORARY TABLE t "
            "(n text, a int, b bigint, c int[], d bigint[], e smallint[], f float8[], g real[], h text[], i boolean[])"
        )
        cursor.copy_expert("COPY t FROM STDIN (FORMAT binary)", io.BytesIO(binary_copy(columns)))
        cursor.execute("SELECT * FROM t")
        rows = cursor.fetchall()
    assert [row[0] for row in rows] == names
    assert [row[1] for row in rows] == [1, -2, 3, 2**31 - 1]
    assert [row[2] for row in rows] == [2**62, -(2**62), 0, 7]
    assert [row[3] for row in rows] == [
        values[:length].tolist() for values, length in zip(integers, lengths, strict=True)
    ]
    assert [row[4] for row in rows] == [
        values[5 - length :].tolist() for values, length in zip(integers, lengths, strict=True)
    ]
    assert [row[5] for row in rows] == [
        (values[:length] % 100).tolist() for values, length in zip(integers, lengths, strict=True)
    ]
    assert [row[6] for row in rows] == reals.tolist()
    np.testing.assert_array_equal(np.array([row[7] for row in rows], np.float32), reals.astype(np.float32))
    assert [row[9] for row in rows] == [
        (values[:length] % 2 == 0).tolist() for values, length in zip(integers, lengths, strict=True)
    ]
    assert [row[8] for row in rows] == [["p", "ä"], [], [""], ["long" * 50]]
