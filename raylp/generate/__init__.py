"""Greedy generation: one interface, a transformers backend and a vLLM backend that give the same tokens."""
