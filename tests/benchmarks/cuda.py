"""(e) The inner step and the scoring on CUDA, where a device is found; chunks as large as a GPU wants them."""

from __future__ import annotations

import torch

from tests.benchmarks import inner_step
from tests.benchmarks.measuring import table
from tests.benchmarks.scene import NUM_ITEMS, Options

CHUNK = 2048


def main(options: Options) -> None:
    """Print the table, or that there is no device."""
    if not torch.cuda.is_available():
        print("(e) no device: torch finds no CUDA here")
        return
    rows = []
    for num_items in (300,) if options.quick else (NUM_ITEMS, 10_000):
        num_users, repeats = (128, 1) if options.quick else (8 * CHUNK, 7)
        rows += inner_step.measure(num_items, num_users=num_users, repeats=repeats, device="cuda", chunk=CHUNK)
    title = f"(e) {torch.cuda.get_device_name()}, chunks of {CHUNK:,}, wall time (median)"
    print(table(title, inner_step.COLUMNS, rows))
