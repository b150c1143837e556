"""Runs unedited TorchServe handlers."""
