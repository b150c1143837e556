"""Unedited TorchServe handlers: their archives, their processes, and what they are sent."""
