"""How a process computes: one setting of threads, numbers and memory, made once before the first tensor."""

from __future__ import annotations

import ctypes

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of mallopt(3)
_KEPT, _LARGEST_KEPT = 256 * 2**20, 32 * 2**20  # bytes; glibc takes no larger one for the second


def prepare(threads: int) -> None:
    """Set torch's threads, flush denormal numbers, and keep freed memory for the next batch.

    Denormal numbers cost a factor of 20. A chunk of users needs some megabytes of scores, which glibc would give back
    to the kernel after every call and fault in again page by page: 5 to 10 % of a worker's time. Other C libraries are
    left as they are.
    """
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, _KEPT)
        mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)
