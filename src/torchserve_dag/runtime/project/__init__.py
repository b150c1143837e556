"""A project's folders, and what its files may say."""
