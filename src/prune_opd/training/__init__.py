"""The loop around the step: models, trainer, checkpoints, arms."""
