"""A worker's pulse as health checks see it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from pipeline.heartbeat import STALE_SECONDS, Heartbeat, pulses


def test_a_worker_that_beats_is_alive_and_one_that_stopped_beating_hangs(tmp_path: Path) -> None:
    heart = Heartbeat(tmp_path)
    assert pulses(tmp_path) == []
    heart.beat()
    assert [(pulse.process_id, pulse.stale) for pulse in pulses(tmp_path)] == [(os.getpid(), False)]
    (file,) = (tmp_path / "workers").iterdir()
    then = time.time() - STALE_SECONDS - 5
    os.utime(file, (then, then))
    assert [pulse.stale for pulse in pulses(tmp_path)] == [True]
    heart.end()
    assert pulses(tmp_path) == []


def test_workers_that_are_gone_or_run_elsewhere_are_not_counted(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    folder = tmp_path / "workers"
    folder.mkdir()
    (folder / f"{socket.gethostname()}-{ended.pid}").touch()
    (folder / f"elsewhere-{os.getpid()}").touch()
    assert pulses(tmp_path) == []
