"""What leaves a run: a checkpoint with its card, or a submission that runs by itself."""
