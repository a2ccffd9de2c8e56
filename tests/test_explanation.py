"""Explanations: computed again from rows by a reader, they are the stored lists; taken apart, they add up to them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import exp
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import Engine, text
from typer.testing import CliRunner

from models.attribution import attribute
from models.gate import GATED
from models.repeats import SHAPE
from pipeline import registry
from pipeline.artefacts import Artefacts
from pipeline.cli import app
from pipeline.loop import Loop
from pipeline.session import SESSION
from pipeline.settings import Settings
from pipeline.worker import build_loop
from schemas.database import connect_engine
from tests.conftest import Database
from tests.factories import chunk, event, meta_parameters, record

ITEMS = [f"item-{number}" for number in range(40)]
NUM_LISTED = 10


@pytest.fixture
def loop(database: Database, writer: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loop]:
    """A worker's loop on a live version whose artefact a reader can read as well."""
    for name, value in {"BROKER": "nowhere:1", "HOME": str(tmp_path), "ENCODER": "hashed:16", "TOP_N": "10"}.items():
        monkeypatch.setenv(f"INNERLOOP_{name}", value)
    monkeypatch.setenv("INNERLOOP_DATABASE_URL", database.writer_url)
    settings = Settings.load()
    parameters = meta_parameters(
        ITEMS[:30],
        encoder="hashed-bag-of-words-1:16",
        repeat_profile=torch.full(SHAPE, 0.5),
        recommend_seen=True,
        gate_credit=1e3,
    )
    registry.register(writer, Artefacts(settings.artefacts_place()), parameters, metrics={}, provenance={})
    with writer.begin() as connection:
        connection.execute(text("INSERT INTO innerloop.catalogue_snapshots DEFAULT VALUES"))
        rows = [{"id": item, "text": f"text of {item}"} for item in ITEMS]
        connection.execute(text("INSERT INTO innerloop.items (item_id, text, snapshot) VALUES (:id, :text, 1)"), rows)
    made = build_loop(settings, connect_engine(database.writer_url, options=SESSION))
    made.wait_for_version()
    made.take_over({("interactions", 0): (0, 10**6)})
    monkeypatch.setenv("INNERLOOP_DATABASE_URL", database.reader_url)
    yield made
    made.store.close()


def feed(loop: Loop, taken: list[tuple[str, str]], kind: str = "click") -> None:
    """Events (user, item), after those that there were."""
    start = loop.progress.positions["interactions", 0]
    rows = [event(user, item, f"e{start + n}", kind) for n, (user, item) in enumerate(taken)]
    loop.advance([chunk([record(row, start + n) for n, row in enumerate(rows)])])


def some_events(loop: Loop, num_events: int = 300) -> None:
    """Clicks of u0 … u4, more than the support set holds, on items that the version knows and on new ones."""
    feed(loop, [(f"u{n % 5}", ITEMS[(n * n + n // 7) % 40]) for n in range(num_events)])


def explained(user: str, item: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["explain", user, item, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_a_reader_computes_the_stored_list_again(loop: Loop, reader: Engine) -> None:
    some_events(loop)
    with reader.connect() as connection:
        query = text("SELECT item_id, rank, score FROM innerloop.scores WHERE user_id = 'u1' ORDER BY rank")
        stored = list(connection.execute(query))
    assert len(stored) == NUM_LISTED
    for item_id, rank, score in stored:
        found = explained("u1", item_id)
        assert found["stored"] == {"rank": rank, "score": score}
        assert (found["rank"], found["score"]) == (rank, pytest.approx(score, abs=1e-6))


@pytest.mark.parametrize("item", ["item-3", "item-35"])
def test_shares_and_calibration_add_up_to_the_score(loop: Loop, item: str) -> None:
    some_events(loop)
    found = explained("u2", item)
    total = found["offset"] + sum(logit for logit, _ in found["shares"].values())
    assert total == pytest.approx(found["logit"], abs=1e-5)
    assert found["score"] == pytest.approx(1 / (1 + exp(-total)), abs=1e-6)
    assert found["adapter"] == "served"
    assert all(abs(found["shares"][name][0]) > 1e-3 for name in ("taste", "popularity", "adapter"))


def test_an_event_is_worth_what_the_item_loses_without_it(loop: Loop) -> None:
    """Left out by `attribute`, and left out of the user's memory."""
    some_events(loop)
    adaptation, catalogue = loop.adaptation, loop.adaptation.catalogue
    row = int(catalogue.row_of[catalogue.number_of["item-4"]])
    whole = attribute(adaptation.ranker, *adaptation.task("u3"), row)
    support = adaptation.table.support_items[int(adaptation.table.slots(["u3"])[0]), -10:]
    for left_out in (9, 4):
        item, support[left_out] = support[left_out], 0
        without = attribute(adaptation.ranker, *adaptation.task("u3"), row)
        support[left_out] = item
        share = whole.events[left_out]
        assert share.logit == pytest.approx(whole.logit - without.logit, abs=1e-5)
        assert share.rank_without == without.rank
        assert abs(share.logit) > 1e-3


def test_events_are_told_newest_first_with_their_types(loop: Loop) -> None:
    feed(loop, [("u9", "item-1"), ("u9", "never-listed")])
    feed(loop, [("u9", "item-2")], kind="purchase")
    told = [(e["events_ago"], e["type"], e["item_id"], e["logit"] == 0) for e in explained("u9", "item-5")["events"]]
    assert told == [
        (1, "purchase", "item-2", False), (2, "click", "never-listed", True), (3, "click", "item-1", False)
    ]  # fmt: skip


def test_a_closed_gate_is_told_and_its_adapter_adds_nothing(loop: Loop, writer: Engine) -> None:
    some_events(loop)
    assert explained("u0", "item-7")["shares"]["adapter"][0] != 0
    with writer.begin() as connection:
        connection.execute(text(f"UPDATE innerloop.user_state SET track = '{{-2000}}', adapter_use = {GATED}"))  # noqa: S608
    found = explained("u0", "item-7")
    assert (found["adapter"], found["shares"]["adapter"][0]) == ("gated", 0)


def test_what_is_never_listed_is_said_and_still_explained(loop: Loop, writer: Engine) -> None:
    some_events(loop)
    feed(loop, [("u1", "item-8")], kind="dismiss")
    with writer.begin() as connection:
        connection.execute(text("UPDATE innerloop.items SET available = false WHERE item_id = 'item-9'"))
    assert [explained("u1", item)["excluded"] for item in ("item-8", "item-9", "item-10")] == [
        "dismissed",
        "withdrawn",
        None,
    ]
    assert explained("u1", "item-8")["stored"] is None
    shown = CliRunner().invoke(app, ["explain", "u1", "item-8"], catch_exceptions=False).stdout
    assert "never listed: the user dismissed it" in shown
    assert "text of item-8 [item-8] for user u1" in shown


def test_a_user_without_events_and_an_item_that_nobody_lists(loop: Loop) -> None:
    some_events(loop)
    assert explained("nobody", "item-1")["source"] == "popular"
    for item, words in (("no-such", "there is no item"), ("never-listed", "events alone")):
        feed(loop, [("u1", "never-listed")])
        result = CliRunner().invoke(app, ["explain", "u1", item], catch_exceptions=False)
        assert (result.exit_code, words in result.stderr) == (1, True)


def test_the_adapters_share_is_what_it_adds_to_the_start(loop: Loop) -> None:
    some_events(loop)
    adaptation = loop.adaptation
    tasks, priors = adaptation.task("u4")
    adapted, start = (logits[0] for logits in adaptation.ranker.logits(tasks, priors))
    for row in (3, 17):
        share = attribute(adaptation.ranker, tasks, priors, row).shares["adapter"]
        assert share.logit == pytest.approx(float(adapted[row] - start[row]), abs=1e-5)
        assert share.rank_without == 1 + int((start > start[row]).sum())


def test_of_a_user_without_positives_popularity_is_all_there_is_to_tell(loop: Loop) -> None:
    some_events(loop)
    feed(loop, [("u8", "item-6")], kind="dismiss")
    found = explained("u8", "item-7")
    assert found["shares"]["popularity"][0] == pytest.approx(found["logit"] - found["offset"], abs=1e-6)
    assert (found["shares"]["taste"][0], found["shares"]["bonus"][0]) == (pytest.approx(0, abs=1e-6), 0)
    assert (found["adapter"], found["events"]) == ("unused", [])
