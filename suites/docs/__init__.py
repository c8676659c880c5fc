"""The documents: every command that they show is one, and runs."""
