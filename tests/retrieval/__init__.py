"""A frozen copy of the project's own docs, and questions with known passages: how well retrieval finds them."""
