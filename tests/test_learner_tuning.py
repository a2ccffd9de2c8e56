"""A learner from meta-training to the ranker that serves it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import get_args

import pytest
import torch
from torch import Tensor

from models import episodic_training, learner_tuning, outer_loop, table_fitting
from models.adapters import ADAPTERS
from models.checkpoint import ArtefactRefused, from_bytes, to_bytes
from models.episode_sources import HonestEpisodes
from models.episodes import Interactions
from models.episodic_training import Serving
from models.item_tables import assemble_items
from models.learner_tuning import Learnt, Method
from models.learners import HONEST, LEARNERS
from models.meta_parameters import MetaParameters
from models.popularity import NUM_BUCKETS, bucket_of
from models.ranker import Ranker, TaskBatch, exclusions
from models.replay import Moments
from pipeline import cli_run
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
    shuffled = TaskBatch(**{name: column[order].clone() for name, column in vars(batch).items()})
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
    with pytest.raises(ValueError, match="no adapter 'ladder'"):
        dataclasses.replace(parameters, adapter="ladder")
    with pytest.raises(ValueError, match="adapter_initial has shape"):
        dataclasses.replace(parameters, adapter="vector")
    with pytest.raises(ValueError, match="step_rates has shape"):
        dataclasses.replace(parameters, step_rates=torch.zeros(3, 5))
    spoilt = dataclasses.replace(parameters, step_rates=parameters.step_rates * torch.nan)
    with pytest.raises(ArtefactRefused, match="step_rates"):
        to_bytes(spoilt)


@pytest.mark.parametrize("pair", [("psychic", "vector"), ("ridge", "lora"), ("honest", "bottleneck"), ("maml", "x")])
def test_a_method_that_does_not_exist_says_what_does(pair: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match=r"there is no|solves for the user's vector itself"):
        Method(*pair).checked()


def trained(interactions: Interactions, method: Method) -> tuple[MetaParameters, dict[str, object]]:
    return outer_loop.meta_train(
        interactions, texts(), item_ids=item_ids(), encoder="test", support_size=20, method=method
    )


def test_what_meta_training_validates_is_what_a_ranker_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(episodic_training, "MAX_EPOCHS", 2)
    seen: list[tuple[HonestEpisodes, Serving, Learnt]] = []
    fit_learner = learner_tuning.fit_learner

    def spy(method: Method, replay: object, batch: TaskBatch, factors: Tensor, **options: object) -> Learnt:
        learnt = fit_learner(method, replay, batch, factors, **options)  # type: ignore[arg-type]
        basis, step = learner_tuning._eigenbasis(replay, factors)  # type: ignore[arg-type]
        seen.append((HonestEpisodes.of(replay, batch, basis, step), Serving(basis, step), learnt))  # type: ignore[arg-type]
        tasks_of.append(batch)
        return learnt

    tasks_of: list[TaskBatch] = []
    monkeypatch.setattr(outer_loop, "fit_learner", spy)
    parameters, report = trained(clustered(), Method("fomaml", "lora"))
    assert (parameters.learner, parameters.adapter, report["learner"]) == ("fomaml", "lora", "fomaml")
    assert "gain_of_inner_step" in report
    source, serving, learnt = seen[0]
    # the same inner loop over the tables of the earlier part, as a worker would hold them
    early = dataclasses.replace(
        parameters,
        use_inner_step=True,
        item_factors=learnt.basis,
        item_events=torch.full((len(item_ids()),), 1e9),  # no text in the item vectors: the basis holds it already
        metric=serving.limits.metric,
        residual_mean=serving.limits.residual_mean,
    )
    model = Ranker(early, assemble_items(early, texts(), torch.arange(len(item_ids()))))
    numbers = (source.replay.num_events >= 3).nonzero()[:40, 0]
    batch = TaskBatch(**{name: column[numbers] for name, column in vars(tasks_of[0]).items()})
    batch.state, batch.state_events = source.state[numbers], source.replay.num_events[numbers]
    served = model.served(batch, torch.zeros(NUM_BUCKETS, len(item_ids()))).deviation
    episodes = source.episodes(numbers)
    vector = serving.limits.limited(learnt.steps.vector(episodes.loss, episodes.context), episodes.num_events)
    torch.testing.assert_close(served, vector.detach(), atol=1e-5, rtol=1e-4)
    assert bool(served.any(1).all())


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

    def note_gains(steps: object, source: HonestEpisodes, numbers: Tensor, serving: Serving) -> Tensor:
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
    assert set(get_args(cli_run.Learners)) == {HONEST, *LEARNERS}
    assert get_args(cli_run.Adapters) == tuple(ADAPTERS)
