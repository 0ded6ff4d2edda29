"""Training that brings a pruned model back."""
