"""Archives: what `build` packs into a `.mar` or `.war`; the same input gives the same bytes."""
