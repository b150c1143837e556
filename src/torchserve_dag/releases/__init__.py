"""Releasing a new version of a model: in steps, watched, and rolled back automatically if it is worse."""
