"""Mending what removed layers leave behind, without training."""
