"""Properties that hold of a single implementation: what may not matter does not, what must matter does."""
