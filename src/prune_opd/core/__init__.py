"""The method as pure functions of tensors. Imports torch and nothing else at run time.

Shapes: B rollouts, T response positions, K top-k candidates, V vocabulary. Log-probabilities are in nats over the
full vocabulary. The shape annotations are checked by jaxtyping when the tests run.
"""
