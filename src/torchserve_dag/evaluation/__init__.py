"""Evaluate before release: a data set through a version, scored, and kept for `rollout --require`."""
