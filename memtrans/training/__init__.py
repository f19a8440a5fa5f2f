"""Training runs: settings, data, steps, checkpoints, evaluation."""
