"""Known bugs, applied to our own code one at a time, and the matrix of which check notices which."""
