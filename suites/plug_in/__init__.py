"""transformers' own models with our operators plugged in, against the same models without."""
