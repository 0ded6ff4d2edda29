"""Load on the endpoint, and what it measures."""
