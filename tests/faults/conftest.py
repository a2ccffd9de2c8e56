"""Faults are injected into the same deployments that the laws are shown on."""

from tests.laws.conftest import deploy, launcher, twin

__all__ = ["deploy", "launcher", "twin"]
