"""Running TorchServe for a project: start it, wait until it serves, look at it, stop it."""
