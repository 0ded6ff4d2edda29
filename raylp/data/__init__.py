"""Parallel text in, prompts out, and splits that cannot leak."""
