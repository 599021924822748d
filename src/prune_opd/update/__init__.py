"""From scored rollouts to new weights: loss, gradient, optimiser."""
