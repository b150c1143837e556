"""TorchServe's loop."""
