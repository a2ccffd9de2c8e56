"""A learner from meta-training to the ranker that serves it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from models import episodic_training, learner_tuning, outer_loop, table_fitting, validation
from models.adapters import ADAPTERS
from models.candidate_losses import NUM_POSITIVES, draw_negatives
from models.checkpoint import ArtefactRefused, from_bytes, to_bytes
from models.episode_sources import ReplayedEpisodes, honest_episodes
from models.episodes import Interactions
from models.episodic_training import Serving
from models.inner_losses import ABSENT, HonestQuadratic
from models.item_tables import assemble_items
from models.learner_tuning import Learnt, Method
from models.learners import HONEST, LEARNERS, RESIDUALS
from models.meta_parameters import MetaParameters
from models.popularity import NUM_BUCKETS, bucket_of
from models.ranker import Ranker, TaskBatch, exclusions
from models.replay import Moments, epochs
from models.table_fitting import Window
from pipeline import cli_train
from tests.factories import learnt_fields, meta_parameters
from tests.test_outer_loop import clustered, item_ids, texts

ITEMS = [f"item-{number:03d}" for number in range(64)]
PAIRS = [(name, adapter) for name in LEARNERS for adapter in ADAPTERS if name != "ridge" or adapter == "vector"]
U, S = 16, 10


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def ranker(learner: str, adapter: str) -> Ranker:
    parameters = meta_parameters(ITEMS, **learnt_fields(learner, adapter))  # type: ignore[arg-type]
    embeddings = torch.randn(len(ITEMS), 16, generator=torch.Generator().manual_seed(1))
    return Ranker(parameters, assemble_items(parameters, embeddings, torch.arange(len(ITEMS))))


def tasks() -> TaskBatch:
    draw = torch.Generator().manual_seed(2)
    lengths = torch.arange(U) % (S + 1)
    support = torch.stack([torch.randperm(len(ITEMS), generator=draw)[:S] for _ in range(U)])
    support[torch.arange(S) < S - lengths[:, None]] = -1
    return TaskBatch(
        support=support,
        weights=torch.rand(U, S, generator=draw) + 0.5,
        num_events=lengths,
        state=torch.randn(U, 16, generator=draw) * lengths[:, None],
        state_events=lengths,
        track=torch.zeros(U, 1),
        excluded=exclusions(support, len(ITEMS)),
        prior_rows=bucket_of(lengths),
    )


PRIORS = torch.randn(NUM_BUCKETS, len(ITEMS), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("learner", "adapter"), PAIRS)
def test_every_version_is_written_read_and_served(learner: str, adapter: str) -> None:
    before = ranker(learner, adapter)
    again = from_bytes(to_bytes(before.parameters))
    after = Ranker(again, before.items)
    adapted, start = after.logits(tasks(), PRIORS)
    assert torch.equal(adapted, before.logits(tasks(), PRIORS)[0])
    there = torch.isfinite(start)
    assert bool(torch.isfinite(adapted[there]).all())
    moved = ((adapted != start) & there).any(1)
    assert moved.tolist() == (tasks().num_events >= again.step_from).tolist()


@pytest.mark.parametrize(("learner", "adapter"), PAIRS)
def test_a_served_user_does_not_depend_on_the_others_nor_on_padding(learner: str, adapter: str) -> None:
    model, batch = ranker(learner, adapter), tasks()
    order = torch.randperm(U, generator=torch.Generator().manual_seed(4))
    shuffled = batch.taken(order)
    shuffled.weights[shuffled.support < 0] = torch.nan
    assert torch.equal(model.logits(shuffled, PRIORS)[0], model.logits(batch, PRIORS)[0][order])


def test_a_user_learns_the_same_whatever_the_learner_makes_of_it() -> None:
    targets = torch.arange(U)
    one, other = (ranker(*pair).step(tasks(), PRIORS, targets) for pair in (("maml", "lora"), ("ridge", "vector")))
    assert torch.equal(one.state, other.state), "residuals are the start's, whatever the adapted prediction was"
    assert torch.equal(one.loss_start, other.loss_start)
    assert not torch.equal(one.loss_adapted, other.loss_adapted)


def test_ridge_with_the_honest_precision_is_the_honest_step() -> None:
    ridge = ranker("ridge", "vector")
    honest = Ranker(dataclasses.replace(ridge.parameters, learner="honest"), ridge.items)
    adapted, start = ridge.logits(tasks(), PRIORS)
    torch.testing.assert_close(adapted, honest.logits(tasks(), PRIORS)[0])
    assert not torch.equal(adapted, start)


def test_an_artefact_with_another_learner_or_other_shapes_is_refused() -> None:
    parameters = ranker("maml", "lora").parameters
    with pytest.raises(ValueError, match="no learner 'psychic'"):
        dataclasses.replace(parameters, learner="psychic")
    with pytest.raises(ValueError, match="no residuals 'x'"):
        dataclasses.replace(parameters, residuals="x")
    with pytest.raises(ValueError, match="no adapter 'ladder'"):
        dataclasses.replace(parameters, adapter="ladder")
    with pytest.raises(ValueError, match="adapter_initial has shape"):
        dataclasses.replace(parameters, adapter="vector")
    with pytest.raises(ValueError, match="step_rates has shape"):
        dataclasses.replace(parameters, step_rates=torch.zeros(3, 5))
    spoilt = dataclasses.replace(parameters, step_rates=parameters.step_rates * torch.nan)
    with pytest.raises(ArtefactRefused, match="step_rates"):
        to_bytes(spoilt)


@pytest.mark.parametrize(
    "words",
    [("psychic", "vector"), ("ridge", "lora"), ("honest", "bottleneck"), ("maml", "x"), ("maml", "vector", "guessed"),
     ("honest", "vector", "support")],
)  # fmt: skip
def test_a_method_that_does_not_exist_says_what_does(words: tuple[str, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"there (is|are) no|solves for the user's vector itself|honest residuals only"
    ):
        Method(*words).checked()


def without_support_after(batch: TaskBatch, age: int) -> TaskBatch:
    """The tasks as they were `age` positives ago, made by hand."""
    earlier = torch.cat([torch.full((U, age), -1), batch.support[:, :-age]], 1)
    weights = torch.cat([torch.full((U, age), torch.nan), batch.weights[:, :-age]], 1)
    num_events = (batch.num_events - age).clamp(min=0)
    return dataclasses.replace(
        batch, support=earlier, weights=weights, num_events=num_events, prior_rows=bucket_of(num_events)
    )


def test_each_event_is_offset_by_what_the_start_gave_before_it_and_knew_nothing_later() -> None:
    model, batch = ranker("maml", "vector"), tasks()
    loss = model.candidate_loss(batch, PRIORS, honest=True)
    free = dataclasses.replace(batch, excluded=torch.zeros_like(batch.excluded))
    newest, tau = min(NUM_POSITIVES, S), model.parameters.tau
    assert loss.target.sum((1, 2)).tolist() == pytest.approx(
        torch.where(batch.support >= 0, batch.weights, 0.0)[:, -newest:].sum(1).tolist()
    )
    for age in range(1, newest + 1):
        group = newest - age
        before = without_support_after(free, age)
        served = model.served(before, PRIORS)
        plain = served.start @ model.items.vectors[:, :16].T + served.prior_weight[:, None] * PRIORS[before.prior_rows]
        for user in range(U):
            item = int(batch.support[user, S - age])
            if item < 0:
                assert not loss.target[user, group].any()
                continue
            assert float(loss.offset[user, group, group]) == pytest.approx(tau * float(plain[user, item]), abs=1e-4)
            others = loss.offset[user, group, :newest][torch.arange(newest) != group]
            assert torch.equal(others, torch.full_like(others, ABSENT)), "a later item competes, or an earlier one"
            torch.testing.assert_close(loss.vectors[user, group], tau * model.items.vectors[item, 16:])


def test_the_usual_loss_offsets_all_by_what_the_start_gives_now() -> None:
    model, batch = ranker("maml", "vector"), tasks()
    usual, honest = (model.candidate_loss(batch, PRIORS, honest=one) for one in (False, True))
    assert usual.offset.shape[1] == 1
    torch.testing.assert_close(usual.mass, honest.mass)
    assert torch.equal(usual.vectors, honest.vectors)
    user = U - 1
    newest = usual.offset[user, 0, NUM_POSITIVES - 1], honest.offset[user, -1, NUM_POSITIVES - 1]
    assert float(newest[0]) != float(newest[1]), "the start knows the item now and did not before it"


def test_items_that_a_user_has_had_do_not_stand_against_her() -> None:
    model, batch = ranker("maml", "vector"), tasks()
    negatives = model.candidate_loss(batch, PRIORS, honest=True)
    drawn = draw_negatives(model.parameters.item_events)
    had = (batch.support[:, :, None] == drawn.rows).any(1)
    assert bool(had.any())
    competing = negatives.offset[:, :, -len(drawn.rows) :] > ABSENT
    assert torch.equal(competing, ~had[:, None].expand_as(competing))


def test_negatives_are_drawn_by_popularity_and_corrected_for_it() -> None:
    events = torch.arange(1000.0) ** 2
    drawn = draw_negatives(events, 200)
    assert len(drawn.rows) == pytest.approx(200, abs=1)
    assert torch.equal(drawn.rows, draw_negatives(events, 200).rows)
    assert float(drawn.rows.float().mean()) > 650
    assert not bool((events[drawn.rows] == 0).any())
    logits = torch.sin(torch.arange(1000.0))
    estimated = torch.logsumexp(logits[drawn.rows] + drawn.correction, 0)
    assert float(estimated) == pytest.approx(float(torch.logsumexp(logits, 0)), abs=0.3)
    everything = draw_negatives(torch.ones(30), 40)
    assert len(everything.rows) == 30
    assert torch.equal(everything.correction, torch.zeros(30))
    assert len(draw_negatives(torch.zeros(5)).rows) == 0


def test_padding_never_reaches_a_candidate_loss() -> None:
    model, batch = ranker("maml", "vector"), tasks()
    clean = model.candidate_loss(batch, PRIORS, honest=True)
    batch.weights[batch.support < 0] = torch.nan
    poisoned = model.candidate_loss(batch, PRIORS, honest=True)
    for one, other in zip(vars(clean).values(), vars(poisoned).values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("residuals", ["events", "support"])
@pytest.mark.parametrize(("learner", "adapter"), [("maml", "lora"), ("ridge", "vector")])
def test_a_version_on_candidates_is_served_and_needs_no_state(learner: str, adapter: str, residuals: str) -> None:
    plain = ranker(learner, adapter)
    model = Ranker(dataclasses.replace(plain.parameters, residuals=residuals), plain.items)
    adapted, start = model.logits(tasks(), PRIORS)
    there = torch.isfinite(start)
    assert bool(torch.isfinite(adapted[there]).all())
    moved = ((adapted != start) & there).any(1)
    assert moved.tolist() == (tasks().num_events >= 1).tolist()
    stateless = dataclasses.replace(tasks(), state=torch.zeros(U, 16), state_events=torch.zeros(U).long())
    assert torch.equal(model.logits(stateless, PRIORS)[0], adapted)


def trained(interactions: Interactions, method: Method) -> tuple[MetaParameters, dict[str, object]]:
    return outer_loop.meta_train(
        Window(interactions, texts(), item_ids=item_ids(), encoder="test", support_size=20), method=method
    )


@pytest.mark.parametrize("residuals", RESIDUALS)
def test_what_meta_training_validates_is_what_a_ranker_serves(residuals: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(episodic_training, "MAX_EPOCHS", 1)
    method, fitted, parts = Method("fomaml", "lora", residuals), list[Learnt](), list[Any]()
    fit_learner = learner_tuning.fit_learner

    def spy(*args: Any, **options: Any) -> Learnt:
        fitted.append(fit_learner(*args, **options))
        parts.append((args, options["first"]))
        return fitted[0]

    monkeypatch.setattr(validation, "fit_learner", spy)
    parameters, report = trained(clustered(), method)
    assert (parameters.learner, parameters.adapter, parameters.residuals, report["learner"]) == (*method, "fomaml")
    assert "gain_of_inner_step" in report
    (learnt,), ((_, early, interactions, replay), first) = fitted, parts[0]
    early = learner_tuning.rebased(early, replay)
    source = learner_tuning.episodes_for(method, early, interactions, replay, first)
    # the same inner loop as a worker would run it over the tables of the earlier part
    fields: dict[str, Any] = {"adapter_initial": learnt.steps.initial, "step_rates": learnt.steps.rates}
    fields |= {"use_inner_step": True, **method._asdict()}
    served = Ranker(dataclasses.replace(early.parameters, **fields), early.items)
    numbers = (replay.num_events >= 3).nonzero()[:40, 0]
    _, side = next(epochs(served, interactions, first))
    batch = side.tasks_before(replay.events[numbers])
    state = honest_episodes(early, interactions, replay).loss(numbers)
    assert isinstance(state, HonestQuadratic)
    batch.state, batch.state_events = state.state, replay.num_events[numbers]
    found = served.served(batch, side.priors).deviation
    episodes = source.episodes(numbers)
    vector = served.inner_step.limited(learnt.steps.vector(episodes.loss, episodes.context), episodes.num_events)
    torch.testing.assert_close(found, vector, atol=1e-5, rtol=1e-4)
    assert bool(found.any(1).all())


def test_a_learner_that_does_not_pay_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(episodic_training, "MAX_EPOCHS", 0)
    worse = torch.full((30,), -0.01)
    monkeypatch.setattr(learner_tuning, "_gains", lambda *_: worse)
    parameters, report = trained(clustered(120), Method("ridge", "vector"))
    assert not parameters.use_inner_step
    assert str(report["inner_step"]).startswith("off")


def test_nobody_judges_a_fit_that_has_seen_them(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted: list[set[int]] = []
    judged: list[set[int]] = []
    fit, gains = episodic_training.fit, learner_tuning._gains

    def note_fit(*args: object, numbers: Tensor, **options: object) -> object:
        fitted.append(set(args[2].users[numbers].tolist()))  # type: ignore[attr-defined]
        return fit(*args, numbers=numbers, **options)  # type: ignore[arg-type]

    def note_gains(steps: object, source: ReplayedEpisodes, numbers: Tensor, serving: Serving) -> Tensor:
        judged.append(set(source.users[numbers].tolist()))
        return gains(steps, source, numbers, serving)  # type: ignore[arg-type]

    monkeypatch.setattr(episodic_training, "MAX_EPOCHS", 0)
    monkeypatch.setattr(learner_tuning, "fit", note_fit)
    monkeypatch.setattr(learner_tuning, "_gains", note_gains)
    trained(clustered(120), Method("ridge", "vector"))
    assert len(judged) == 2
    assert not fitted[0] & judged[0]
    assert not fitted[1] & judged[1]
    assert judged[0] | judged[1] == fitted[2]


def test_refitted_factors_are_turned_into_the_learners_basis_and_keep_their_lengths() -> None:
    draw = torch.Generator().manual_seed(0)
    basis = torch.randn(50, 8, generator=draw)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=draw)).Q
    moments = Moments(torch.zeros(50), torch.eye(50))
    turned, metric = table_fitting._turned(basis @ rotation + 0.01 * torch.randn(50, 8, generator=draw), basis, moments)
    torch.testing.assert_close(turned, basis, atol=0.05, rtol=0)
    torch.testing.assert_close(metric, turned.square().sum(0))


def test_the_same_data_and_seed_give_the_same_learner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(episodic_training, "MAX_EPOCHS", 1)
    one, other = (trained(clustered(100), Method("meta-sgd", "bottleneck"))[0] for _ in range(2))
    assert all(torch.equal(tensor, other.tensors()[name]) for name, tensor in one.tensors().items())


def test_the_command_offers_what_there_is() -> None:
    assert set(get_args(cli_train.Learners)) == {HONEST, *LEARNERS}
    assert get_args(cli_train.Adapters) == tuple(ADAPTERS)
    assert get_args(cli_train.Residuals) == RESIDUALS
