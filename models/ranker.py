"""Score, predict before learning, learn, and list: the served form of the model for all users of a batch at once.

Everything collapses to `logit_i = q . v_i + w0 * prior_i + bonus_i`: q over the D item-item dimensions and the F inner
factors; the start (`models.start`) gives all but the F factors' share, which is the adapter's.
Letters: U users, N catalogue items, D item-item dimensions, F inner factors, P parts, M memories, R prior rows,
W columns of scores: the N items and what fills them up, as in `models.start`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from models.adapters import adapter_named, context_of
from models.candidate_losses import candidate_loss, draw_negatives
from models.candidates import Candidates, Sampling, draw, predict
from models.chains import Chains
from models.gate import SERVED, Gate
from models.inner_loop import InnerStep
from models.inner_losses import CrossEntropy, HonestQuadratic, InnerLoss
from models.item_tables import LINE, ItemTables
from models.learners import HONEST, InnerSteps
from models.logit_reading import LOSS_LIMIT, capped_loss, chances, contest, ranks_of, weighted_sums
from models.memories import TAU, Memories
from models.meta_parameters import MetaParameters
from models.popularity import bucket_of
from models.start import BONUS_SLOTS, BONUS_SUPPORT, Start
from models.tasks import Served, Step, TaskBatch, Top, exclusions
from models.top_items import best_rows

__all__ = [
    "BONUS_SLOTS",
    "BONUS_SUPPORT",
    "LOSS_LIMIT",
    "Ranker",
    "Served",
    "Step",
    "TaskBatch",
    "Top",
    "exclusions",
]


class Ranker:
    """Meta-parameters over one catalogue."""

    sampling = Sampling(from_items=5000, num=255)  # measured: `python -m tests.benchmarks inner-step`

    def __init__(self, parameters: MetaParameters, items: ItemTables) -> None:
        """Keep the learnt constants on the device of `items`."""
        device = items.vectors.device
        self.items = items
        self.parameters = parameters
        self.state_size: int = parameters.item_factors.shape[1]
        self._memories = Memories.of(parameters)
        self.track_size = len(self._memories)
        known = items.trained_index >= 0
        self._calibration = parameters.calibration.to(device)
        num_items, dims = items.num_items, parameters.item_out.shape[1]
        columns = functional.pad(items.vectors.T, (0, LINE - num_items % LINE)).contiguous()
        self._factors = columns[dims:]  # [F, W]
        self._item_factors = items.vectors[:, dims:].contiguous()
        self._start = Start(parameters, items, columns[:dims], self._memories)
        self._steps = InnerSteps(
            adapter_named(parameters.adapter, self.state_size),
            parameters.adapter_initial.to(device),
            parameters.step_rates.to(device),
            parameters.precision.to(device),
        )
        events = parameters.item_events.to(device)[items.trained_index.clamp(min=0)]
        self._item_events = torch.where(known, events, 0.0)
        self._negatives = draw_negatives(self._item_events)
        self._inner = InnerStep(
            metric=parameters.metric.to(device),
            precision=parameters.precision.to(device),
            residual_mean=parameters.residual_mean.to(device),
            tau=parameters.tau,
            discount=parameters.discount,
            trust_radius=parameters.trust_radius,
            step_from=parameters.step_from,
        )
        self._gate = Gate(parameters.gate_discount, parameters.gate_credit)

    @property
    def inner_step(self) -> InnerStep:
        """How residuals are taken, and how far they may move a user."""
        return self._inner

    def served(self, tasks: TaskBatch, priors: Tensor) -> Served:
        """Collapse start and deviation of every user; priors are [R, N]."""
        support = self._start.support(tasks)
        items, bonus = self._start.finish(self._start.plain(support, tasks, priors), support, tasks)
        listed = torch.isfinite(bonus)
        bonus_items = torch.where(listed, items, self.items.num_items)
        deviation = self._deviation(tasks, priors)[0]
        return Served(support.vector, deviation, support.prior_weight, bonus_items, torch.where(listed, bonus, 0.0))

    def logits(self, tasks: TaskBatch, priors: Tensor) -> tuple[Tensor, Tensor]:
        """Adapted and start logits [U, N] from the served form; excluded items are -inf. Priors are [R, N]."""
        start = self._start.logits(tasks, priors)
        adapted = self._adapted(start, self._deviation(tasks, priors)[0])
        return adapted[:, : self.items.num_items], start[:, : self.items.num_items]

    def start(self, tasks: TaskBatch, priors: Tensor) -> Tensor:
        """Start logits [U, N] alone."""
        return self._start.logits(tasks, priors)[:, : self.items.num_items]

    def candidates(self, turn: int) -> Candidates | None:
        """Candidates [C] that stand for the catalogue in `step` during a turn; None while it is small."""
        if self.items.num_items < self.sampling.from_items:
            return None
        return draw(self._item_events.clamp(min=1.0), self.sampling.num, turn=turn)

    def step(
        self,
        tasks: TaskBatch,
        priors: Tensor,
        targets: Tensor,
        previous: Tensor | None = None,
        candidates: Candidates | None = None,
    ) -> Step:
        """Predict targets [U] (catalogue rows, -1 = no row) before learning from them.

        A target is ranked among the items that are not excluded, and itself. One call may hold several events of a
        user, oldest first: `previous` [U] then gives the row of the user's event before (-1 = none in this call), whose
        state after is used instead of `tasks.state`. That is possible because honest residuals need the start only.
        With `candidates` [U, C], losses and residuals are taken over these; ranks are those in the catalogue always.
        """
        known, rows = targets >= 0, targets.clamp(min=0)
        recalled = self._recalled(tasks, priors, targets, previous, candidates)
        start = self._contested(tasks, priors, rows, recalled[0])
        prediction = self._prediction(start, rows, candidates)
        residual = self._inner.honest(
            self._item_factors.index_select(0, rows), self._expected(prediction, rows, candidates)
        )
        chains = Chains(previous, known & torch.isfinite(residual).all(1))
        events = chains.counts(tasks.state_events)
        state, state_after = chains.carry(self._inner.discount, tasks.state, residual)
        adapted = self._adapted(start, self._inner_deviation(tasks, priors, state, events))
        losses = self._losses(adapted, prediction, targets, candidates)
        track, track_after = chains.carry(self._gate.discount, tasks.track[:, :1], (losses[1] - losses[0])[:, None])
        state_after, events, track_after = self._kept(state_after, chains.counts_after(events), track_after)
        is_open = self._gate.is_open(track[:, 0])
        ranks = ranks_of(adapted, rows) * known, ranks_of(start, rows) * known
        return Step(
            state_after,
            events,
            torch.cat([track_after, recalled[1]], 1),
            loss_adapted=torch.where(is_open, *losses),
            loss_start=losses[1],
            rank_adapted=torch.where(is_open, *ranks),
            rank_start=ranks[1],
            rank_popular=ranks_of(self._popular(tasks, priors, rows), rows) * known,
        )

    def rank(self, tasks: TaskBatch, priors: Tensor, k: int) -> Top:
        """List the k best items of every user; equal logits are ordered by row."""
        start = self._start.logits(tasks, priors)
        deviation, use = self._deviation(tasks, priors)
        items, values = best_rows(self._adapted(start, deviation), k)
        return Top(items, self.calibrated(values, tasks.num_events), use)

    def calibrated(self, logits: Tensor, num_events: Tensor) -> Tensor:
        """Logits [U, X] of users with so many events [U] as they are served: `score = sigmoid(calibrated)`."""
        scale, offset = self.calibration(num_events).unbind(1)
        return logits * scale[:, None] + offset[:, None]

    def calibration(self, num_events: Tensor) -> Tensor:
        """Scale and offset [U, 2] for users with so many events [U]."""
        return self._calibration.index_select(0, bucket_of(num_events))

    def parts(self, tasks: TaskBatch, priors: Tensor) -> Tensor:
        """What popularity and each part give alone, all neighbours added, nothing excluded: [U, 1 + P, N].

        The start is their sum under the part weights, but for the limit of the bonus list and the items' biases.
        """
        found = [priors.index_select(0, tasks.prior_rows)]
        for weights in torch.eye(1 + self._start.num_parts, device=priors.device)[1:]:
            support = self._start.memory(tasks, self._start.gains[0], weights.expand(len(tasks.support), -1))
            support = support._replace(bias_weight=torch.zeros_like(support.bias_weight))
            scores = self._start.with_neighbours(self._start.plain(support, tasks, priors), support, tasks)
            found.append(scores[:, : self.items.num_items])
        return torch.stack(found, 1)

    def memory_gains(
        self, tasks: TaskBatch, priors: Tensor, targets: Tensor, candidates: Candidates | None = None
    ) -> Tensor:
        """Loss at targets [U] of the first memory's start less that of each other one [U, M - 1], bonus lists aside."""
        known, rows = targets >= 0, targets.clamp(min=0)
        place, losses = rows if candidates is None else torch.full_like(rows, candidates.columns.shape[1]), []
        for gains in self._start.gains:
            start = self._start.plain(self._start.memory(tasks, gains), tasks, priors)
            own = start.gather(1, rows[:, None])
            start[:, : self.items.num_items] += tasks.excluded
            prediction = self._prediction(contest(start, rows, own), rows, candidates, TAU)
            losses.append(capped_loss(prediction, place, known))
        return torch.stack([losses[0] - loss for loss in losses[1:]], 1)

    def _recalled(
        self,
        tasks: TaskBatch,
        priors: Tensor,
        targets: Tensor,
        previous: Tensor | None,
        candidates: Candidates | None,
    ) -> tuple[Tensor, Tensor]:
        """Tracks of the memories before and after each event [U, M - 1]."""
        track = tasks.track[:, 1:]
        if len(self._memories) == 1:
            return track, track
        earned = self.memory_gains(tasks, priors, targets, candidates)
        return Chains(previous, targets >= 0).carry(self._memories.discount, track, earned)

    def _prediction(
        self, logits: Tensor, rows: Tensor, candidates: Candidates | None, tau: float | None = None
    ) -> Tensor:
        """Chance of every item [U, W], or of the candidates and last the items in rows [U, C + 1]."""
        tau = self._inner.tau if tau is None else tau
        if candidates is None:
            return chances(logits, tau)
        scores = logits.gather(1, torch.cat([candidates.columns, rows[:, None]], 1)).mul_(tau)
        scores[:, :-1] += candidates.correction
        return predict(scores, candidates.columns, rows)

    def _expected(self, prediction: Tensor, rows: Tensor, candidates: Candidates | None) -> Tensor:
        """Mean factors [U, F] under a prediction."""
        if candidates is None:
            return prediction @ self._factors.T
        return weighted_sums(self._item_factors[:, None], torch.cat([candidates.columns, rows[:, None]], 1), prediction)

    def _contested(self, tasks: TaskBatch, priors: Tensor, rows: Tensor, track: Tensor) -> Tensor:
        """The start [U, W] in a contest of the items in rows [U], which keep their logits where they are excluded."""
        support = self._start.support(tasks, track)
        start = self._start.plain(support, tasks, priors)
        own = start.gather(1, rows[:, None])
        self._start.finish(start, support, tasks)
        return contest(start, rows, own)

    def _losses(
        self, adapted: Tensor, prediction: Tensor, targets: Tensor, candidates: Candidates | None
    ) -> tuple[Tensor, Tensor]:
        """Losses [U] at the targets of adapted logits [U, W], and of the start's prediction."""
        known, rows = targets >= 0, targets.clamp(min=0)
        place = rows if candidates is None else torch.full_like(rows, prediction.shape[1] - 1)
        moved = self._prediction(adapted, rows, candidates)
        return capped_loss(moved, place, known), capped_loss(prediction, place, known)

    def _popular(self, tasks: TaskBatch, priors: Tensor, rows: Tensor) -> Tensor:
        """Popularity [U, N] as `contest` leaves it."""
        popular = priors.index_select(0, tasks.prior_rows)
        own = popular.gather(1, rows[:, None])
        return contest(popular.add_(tasks.excluded), rows, own)

    def candidate_loss(self, tasks: TaskBatch, priors: Tensor, *, honest: bool) -> CrossEntropy:
        """Cross-entropy of the users' newest positives, offset by the start without its bonus list; priors [R, N].

        `honest` offsets each event by what the start gave before it, otherwise all of them by what it gives now.
        """

        def start(asked: TaskBatch) -> Tensor:
            return self._start.plain(self._start.support(asked), asked, priors)[:, : self.items.num_items]

        factors = self.items.vectors[:, -self.state_size :]
        return candidate_loss(start, tasks, self._negatives, factors, tau=self._inner.tau, honest=honest)

    def _deviation(self, tasks: TaskBatch, priors: Tensor) -> tuple[Tensor, Tensor]:
        """What is served of the adapters [U, F], zeros where their gates are closed, and their use [U]."""
        deviation = self._inner_deviation(tasks, priors, tasks.state, tasks.state_events)
        sound = self._inner.sound(tasks.state, tasks.state_events)
        use = self._gate.use(tasks.track[:, 0], sound=sound, moves=(deviation != 0).any(1))
        return torch.where((use == SERVED)[:, None], deviation, 0.0), use

    def _inner_deviation(self, tasks: TaskBatch, priors: Tensor, state: Tensor, state_events: Tensor) -> Tensor:
        """Run the inner loop of the version's learner, collapsed to the inner factors: [U, F]."""
        if not self.parameters.use_inner_step:
            return torch.zeros_like(state)
        if self.parameters.learner == HONEST:
            return self._inner.deviation(state, state_events, tasks.num_events)
        loss: InnerLoss
        if self.parameters.residuals == "honest":
            loss = HonestQuadratic(state, self._inner.weight(state_events), self._inner.metric, self._inner.tau)
        else:
            loss = self.candidate_loss(tasks, priors, honest=self.parameters.residuals == "events")
        context = state
        if self._steps.adapter.reads_context:
            context = context_of(self.items.vectors[:, -self.state_size :], tasks.support, tasks.weights)
        return self._inner.limited(self._steps.vector(loss, context), tasks.num_events)

    def _kept(self, state: Tensor, state_events: Tensor, track: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Throw adapters away that have diverged: they begin anew, behind closed gates."""
        sound = self._inner.sound(state, state_events)
        state, track = torch.where(sound[:, None], state, 0.0), torch.where(sound[:, None], track, self._gate.shut)
        return state, torch.where(sound, state_events, 0), track

    def _adapted(self, start: Tensor, deviation: Tensor) -> Tensor:
        return torch.addmm(start, deviation, self._factors)
