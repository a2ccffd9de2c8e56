"""What innerloop costs and where it stops: `python -m tests.benchmarks`, results in LOG.md."""
