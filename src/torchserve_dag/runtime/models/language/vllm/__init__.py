"""vLLM's server, beside the worker."""
