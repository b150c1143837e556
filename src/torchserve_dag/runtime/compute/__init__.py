"""Where and how a model computes."""
