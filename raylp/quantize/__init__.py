"""Fewer bits for the models of a run: another axis beside fewer layers."""
