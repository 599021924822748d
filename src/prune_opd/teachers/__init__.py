"""Teachers: who scores every position of a rollout."""
