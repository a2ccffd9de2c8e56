"""Chances are those of a softmax, and excluded items have none that counts."""

from __future__ import annotations

import math

import torch

from models.logit_reading import chances


def test_chances_are_those_of_a_softmax_and_leave_the_logits_alone() -> None:
    logits = torch.randn(7, 300, generator=torch.Generator().manual_seed(0)) * 20
    before = logits.clone()
    expected = torch.softmax(1.5 * logits.double(), 1)
    torch.testing.assert_close(chances(logits, 1.5).double(), expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(logits, before)


def test_excluded_items_change_no_other_chance() -> None:
    logits = torch.randn(7, 300, generator=torch.Generator().manual_seed(0))
    excluded = torch.arange(300) % 3 == 0
    found = chances(logits.masked_fill(excluded, -math.inf), 1.5)
    torch.testing.assert_close(found[:, ~excluded], torch.softmax(1.5 * logits[:, ~excluded], 1), rtol=1e-5, atol=1e-7)
    assert bool((found[:, excluded] < 1e-37).all())
