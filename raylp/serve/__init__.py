"""The endpoint: Ray Serve with vLLM."""
