"""Samplers: where rollouts come from."""
