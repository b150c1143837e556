"""Bytes and files to typed values, and back."""
