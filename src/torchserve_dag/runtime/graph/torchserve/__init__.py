"""TorchServe's own workflow files, and the .war."""
