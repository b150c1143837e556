"""Unedited TorchServe handlers."""
