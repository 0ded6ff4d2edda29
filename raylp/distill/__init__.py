"""Teacher translations of the training text."""
