"""A project's folders, and the keys that its files may have."""
