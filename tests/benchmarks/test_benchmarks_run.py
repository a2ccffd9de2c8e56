"""The benchmarks run, and what they compare is equal: float32 with float64, a batch with user by user."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from pipeline import embedded_broker, embedded_database
from tests.benchmarks import inner_step
from tests.benchmarks.__main__ import BENCHMARKS
from tests.benchmarks.scene import Deployment, Options, catalogue, filled, parameters
from tests.conftest import TEMPLATE, Postgres, short_lived_folder


@pytest.fixture
def options(services: Postgres) -> Options:
    """Quick, on databases of the session's server."""

    @contextmanager
    def deploy(num_items: int, with_broker: bool) -> Iterator[Deployment]:
        name, process_id = f"bench_{uuid.uuid4().hex[:12]}", embedded_database.daemon(services.folder).pid()
        assert process_id is not None
        services.execute(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE} OWNER innerloop_owner")
        owner, writer, reader = (services.url(user, name) for user in embedded_database.LOGINS)
        with short_lived_folder() as folder:
            try:
                broker = embedded_broker.start(folder) if with_broker else ""
                yield filled(Deployment(folder, broker, owner, writer, reader, process_id), num_items)
            finally:
                embedded_broker.stop(folder)
        services.execute(f"DROP DATABASE {name} WITH (FORCE)")

    return Options(quick=True, repeats=1, deploy=deploy)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_prints_its_table(name: str, options: Options, capsys: pytest.CaptureFixture[str]) -> None:
    BENCHMARKS[name](options)
    printed = capsys.readouterr().out
    assert "|-----" in printed or "no device" in printed


def test_a_step_that_is_wrong_does_not_pass_for_equal() -> None:
    values = parameters(300)
    items = catalogue(values).tables
    users = inner_step.draw_users(values, 64, "cpu")
    inner_step.check_step(values, items, users, "cpu", ways=(inner_step.batched, inner_step.user_by_user))
    wrong = inner_step.draw_users(values, 64, "cpu")
    wrong.start = wrong.start + 1e-3 * torch.randn_like(wrong.start)
    expected = inner_step.batched(inner_step.inner_step(values, "cpu"), inner_step.tables_of(values, items), users)
    found = inner_step.batched(inner_step.inner_step(values, "cpu"), inner_step.tables_of(values, items), wrong)
    assert inner_step.difference(found, expected.double()) > inner_step.TOLERANCE
