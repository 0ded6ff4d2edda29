"""Metrics with additive statistics, and confidence intervals over sentences."""
