"""The golden vectors of this version: written by `v32 golden update`, explained in docs/golden.md."""
