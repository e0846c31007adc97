"""The loop over steps, evaluation, checkpoints and the run folder."""
