"""Translate the test sets with every model of a run, score, compare."""
