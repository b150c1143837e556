"""Converts bytes and files to typed values, and back."""
