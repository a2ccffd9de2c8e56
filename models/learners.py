"""Meta-learners on one footing: what they differ in is a row of a table, not a copy of the loop.

Every gradient learner runs `theta <- theta - rates[k] * slope / (mass + PRIOR_EVENTS)` for a few steps from a
meta-learned `theta`, all users of a batch at once. They differ in which rates are zero, which are learnt, and in how
the outer gradient flows back:

=========  ==================================================================================================
maml       through the steps, second order (Finn 2017)
fomaml     past the steps: the slope counts as a constant (Finn 2017)
anil       as maml, but only the adapter's head moves in the inner loop (Raghu 2020)
reptile    not at all: theta moves towards where the steps ended (Nichol 2018)
meta-sgd   as maml, and the rates are learnt per parameter and step (Li 2017; Antoniou 2019)
ridge      through a closed-form solve in place of steps, with learnt precisions (Bertinetto 2019)
=========  ==================================================================================================

Letters: U users, F inner factors, A parameters of a user, K steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.adapters import Adapter, VectorAdapter
from models.inner_losses import InnerLoss

HONEST = "honest"  # the MAP step of inner_loop.py, which needs no outer loop
# What the inner loss is made of: errors before each event, by their sum or one by one; or what the start errs now.
RESIDUALS = ("honest", "events", "support")
PRIOR_EVENTS = 300.0  # a step is as long as if so many more events had said nothing: short histories move little


@dataclass(frozen=True)
class Learner:
    """What sets a meta-learner apart."""

    second_order: bool = False
    adapts_body: bool = True
    learns_rates: bool = False
    follows_adapted: bool = False
    solves: bool = False


LEARNERS = {
    "maml": Learner(second_order=True),
    "fomaml": Learner(),
    "anil": Learner(second_order=True, adapts_body=False),
    "reptile": Learner(follows_adapted=True),
    "meta-sgd": Learner(second_order=True, learns_rates=True),
    "ridge": Learner(solves=True),
}


@dataclass(frozen=True)
class InnerSteps:
    """The inner loop of a trained learner: from a loss per user to a vector per user.

    Attributes:
        adapter: what is adapted.
        initial: [A] where every user begins.
        rates: [K, A] step sizes; zero for what stays; K = 0 for a closed-form solve.
        precision: [F] of the closed-form solve; not read where there are steps.

    """

    adapter: Adapter
    initial: Tensor
    rates: Tensor
    precision: Tensor

    @classmethod
    def solving(cls, precision: Tensor) -> InnerSteps:
        """Solve for the vector itself under a prior precision [F]."""
        adapter = VectorAdapter(len(precision))
        return cls(adapter, torch.zeros_like(precision), precision.new_zeros(0, adapter.size), precision)

    def parameters(self, loss: InnerLoss, context: Tensor, *, second_order: bool = True) -> Tensor:
        """Adapted parameters [U, A]; context [U, F]. First order: a backward pass takes the slopes for constants."""
        theta = self.initial.expand(len(context), -1)
        share = 1.0 / (loss.mass + PRIOR_EVENTS)[:, None]
        for rate in self.rates:
            slope = share * loss.slope(self.adapter.collapse(theta, context))
            step = self.adapter.pull_back(theta, context, slope)
            theta = theta - rate * (step if second_order else step.detach())
        return theta

    def vector(self, loss: InnerLoss, context: Tensor, *, second_order: bool = True) -> Tensor:
        """Deviation [U, F] of every user."""
        if len(self.rates) == 0:
            return loss.solve(self.precision)
        theta = self.parameters(loss, context, second_order=second_order)
        return self.adapter.collapse(theta, context)
