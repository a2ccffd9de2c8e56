"""Faults injected into a worker: crashes at named places, and inputs that can never be applied."""
