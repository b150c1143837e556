"""Archives: what `build` puts into a `.mar`, and how it is written so that the same input gives the same bytes."""
