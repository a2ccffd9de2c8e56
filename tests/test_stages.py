"""Long commands say on standard error what they are at, also where it is no terminal."""

from __future__ import annotations

import pytest

from pipeline.stages import PlainStages


def test_a_stage_is_told_when_it_begins_when_it_ends_and_not_at_every_step(capsys: pytest.CaptureFixture[str]) -> None:
    with PlainStages() as progress:
        for done in range(4):
            progress("weigh", done, 3)
        progress("weigh", 3, 3)  # the last step, and then the end
        progress("judge", 1_000, 2_000)
    assert capsys.readouterr().err.splitlines() == ["weigh: 0 of 3", "weigh: 3 of 3", "judge: 1,000 of 2,000"]


def test_where_nobody_knows_how_many_steps_there_are_none_is_made_up(capsys: pytest.CaptureFixture[str]) -> None:
    with PlainStages() as progress:
        progress("read events", 5_000, None)
        progress("read events", 10_000, None)
        progress("read events", 12_345, 12_345)
    assert capsys.readouterr().err.splitlines() == ["read events: 5,000", "read events: 12,345 of 12,345"]
