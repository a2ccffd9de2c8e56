"""Implicit ALS (Hu 2008) by the library `implicit`, new users folded in by one exact solve.

Letters: U users, N items, F factors.
"""

from __future__ import annotations

import torch
from implicit.als import AlternatingLeastSquares
from scipy.sparse import csr_matrix
from threadpoolctl import threadpool_limits
from torch import Tensor

from models.episodes import Interactions
from models.item_fitting import Matrix
from models.peers.peer import Known

FACTORS, ROUNDS = 64, 12
NEWEST = 100  # events that a user is folded in from


class FoldedALS:
    """Item factors from the fit; a user is the least-squares answer to what she had, older events counting less."""

    def __init__(self, fitted: Interactions, *, ridge: float, alpha: float, decay: float, seed: int = 0) -> None:
        matrix = Matrix.of(fitted)
        cells = (torch.ones(len(matrix.users)).numpy(), (matrix.users.numpy(), matrix.items.numpy()))
        table = csr_matrix(cells, shape=(matrix.num_users, matrix.num_items))
        with threadpool_limits(1, "blas"):  # the library warns otherwise: its own threads and BLAS' fight
            model = AlternatingLeastSquares(
                factors=FACTORS, regularization=ridge, alpha=alpha, iterations=ROUNDS, num_threads=1, random_state=seed
            )
            model.fit(table, show_progress=False)
        self.items = torch.from_numpy(model.item_factors).float()
        self._ridge, self._alpha, self._decay = ridge, alpha, decay

    def scores(self, known: Known) -> Tensor:
        """Fold the users in, then factors times factors."""
        return self.users(known) @ self.items.T

    def users(self, known: Known) -> Tensor:
        """Solve (Y'Y + ridge I + (alpha - 1) Y_h' W Y_h) u = alpha Y_h' W 1 for every user, W = decay^age: [U, F]."""
        newest = known.history[:, -NEWEST:]
        ages = torch.arange(newest.shape[1] - 1, -1, -1, dtype=torch.float32)
        weights = torch.where(newest >= 0, self._decay**ages, 0.0)[..., None]
        had = self.items[newest.clamp(min=0)]
        shared = self.items.T @ self.items + self._ridge * torch.eye(self.items.shape[1])
        normal = shared + (self._alpha - 1) * had.transpose(1, 2) @ (weights * had)
        solved: Tensor = torch.linalg.solve(normal, self._alpha * (weights * had).sum(1))
        return solved

    def learn(self, known: Known, items: Tensor) -> None:
        """Item factors stay as fitted; the fold-in reads the user's newest history anyway."""
