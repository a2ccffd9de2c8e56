"""The command line: `innerloop …`. Commands import what they need when they run, so that --help answers at once.

Exit codes: 0 done, 1 failed, 2 usage, 3 fenced (another worker took the partitions), 78 configuration.
"""

# \b is click's mark for a paragraph that keeps its lines; a raw string would lose it
from __future__ import annotations

import logging
import os
import sys

import typer

from pipeline import (
    cli_backtest,
    cli_bench,
    cli_dataset,
    cli_drift,
    cli_explain,
    cli_feed,
    cli_forget,
    cli_models,
    cli_read,
    cli_run,
    cli_services,
    cli_train,
)
from schemas.errors import ConfigurationError

FAILED, CONFIGURATION = 1, 78

# Threads that wait for each other by spinning take the cores from those that they wait for: on a busy machine a product
# in two threads took twelve times as long (tests/benchmarks/LOG.md). Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

app = typer.Typer(
    name="innerloop",
    help="""
    Clicks in, per-user adapted scores out: Kafka → a batched inner loop → Postgres.

    \b
    See it work on real data (under four minutes, stops by itself):
      innerloop demo

    \b
    Or step by step, on the embedded broker and database:
      innerloop services up
      innerloop migrate
      innerloop dataset ml-100k --out data --part fit
      innerloop items data/items.jsonl
      innerloop meta-train data/interactions.jsonl.gz --items data/items.jsonl
      innerloop worker &
      innerloop produce my-clicks.jsonl
      innerloop recommend 42

    \b
    Against your own: export INNERLOOP_BROKER=kafka:9092
                      export INNERLOOP_DATABASE_URL=postgresql://user:password@host/name
    All settings: innerloop config.  Exit codes: 0 done, 1 failed, 2 usage, 3 fenced, 78 configuration.
    """,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
cli_run.register(app)
cli_services.register(app)
cli_train.register(app)
cli_feed.register(app)
cli_dataset.register(app)
cli_backtest.register(app)
cli_bench.register(app)
cli_read.register(app)
cli_explain.register(app)
cli_forget.register(app)
cli_drift.register(app)
cli_models.register(app)


def main() -> None:
    """Run a command; conditions that an operator can correct end it with one clear line and their exit code."""
    # kafka-python logs every reconnection; what matters reaches the user as an exception.
    logging.getLogger("kafka").setLevel(logging.CRITICAL)
    try:
        app()
    except ConfigurationError as wrong:
        _stop(wrong, CONFIGURATION)
    except _correctable() as wrong:
        _stop(wrong, CONFIGURATION)
    except _away() as away:
        _stop(away, FAILED)
    except BrokenPipeError:
        # The reader of our output went away (`| head`); Python would complain once more at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILED)


def _stop(error: Exception, code: int) -> None:
    print(f"innerloop: {_first_line(error)}", file=sys.stderr)
    sys.exit(code)


def _first_line(error: Exception) -> str:
    # SQLAlchemy's text goes on with the statement and a link; the driver's own error is what happened.
    orig = getattr(error, "orig", None)
    lines = str(orig or error).strip().splitlines()
    where = "the database (INNERLOOP_DATABASE_URL): " if orig and not orig.pgcode else ""  # it was not reached
    return where + (lines[0] if lines else type(error).__name__)


def _correctable() -> tuple[type[Exception], ...]:
    return _of_loaded_modules("models.encoder:EncoderUnavailable")


def _away() -> tuple[type[Exception], ...]:
    return _of_loaded_modules(
        "sqlalchemy.exc:DBAPIError",
        "models.checkpoint:ArtefactRefused",
        "pipeline.registry:NoLiveVersion",
        "pipeline.versions:NotPossible",
        "pipeline.topics:BrokerUnavailable",
        "pipeline.session:StoreUnavailable",
        "pipeline.artefacts:ArtefactsUnavailable",
    )


def _of_loaded_modules(*names: str) -> tuple[type[Exception], ...]:
    """Find exceptions by `module:name`; one whose module was never imported cannot have been raised."""
    split = (name.split(":") for name in names)
    return tuple(getattr(sys.modules[module], name) for module, name in split if module in sys.modules)


if __name__ == "__main__":
    main()
