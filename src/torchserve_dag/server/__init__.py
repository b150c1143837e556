"""TorchServe for a project: start it, wait until it serves, read its status, stop it."""
