"""The figures of a backtest as TensorBoard scalars: one run per recommender, buckets of K as steps."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from pipeline.backtest_result import StreamResult
from pipeline.backtest_static import METRICS, StaticResult
from pipeline.protocols import SHOTS
from schemas.errors import ConfigurationError


class TensorboardUnavailable(ConfigurationError):
    """tensorboard is not installed: install the extra that the message names, or leave --tensorboard out."""


def check_available() -> None:
    """Raises TensorboardUnavailable before any work is done."""
    if find_spec("tensorboard") is None:
        raise TensorboardUnavailable("--tensorboard needs it: pip install 'innerloop[tensorboard]'")


def write_logs(result: StreamResult | StaticResult, folder: Path) -> None:
    """Write event files under a folder, one run for each recommender."""
    from torch.utils.tensorboard import SummaryWriter

    for name in ("adapted", "start", *result.peers):
        with SummaryWriter(str(folder / name)) as writer:
            for tag, value, step in _scalars(result, name):
                writer.add_scalar(tag, value, step)


def _scalars(result: StreamResult | StaticResult, name: str) -> list[tuple[str, float, int]]:
    if isinstance(result, StaticResult):
        return [
            (f"static/{metric}", interval.mean, shots)
            for shots in SHOTS
            for metric, interval in zip(METRICS, result.at(name, shots), strict=True)
        ]
    rows = [
        (f"by_k/{metric}", interval.mean, step)
        for step, row in enumerate(result.by_k(name))
        for metric, interval in row.metrics.items()
    ]
    overall = [(f"overall/{metric}", interval.mean, 0) for metric, interval in result.overall(name).metrics.items()]
    return rows + overall
