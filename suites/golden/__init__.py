"""Golden vectors: that they are what the reference computes, that every change of them is found, that others can read them."""
