"""Held-out accuracy: sampling k answers to each problem, and grading them."""
