"""Releasing a new version of a model: step by step, watched, and back by itself where it is worse."""
