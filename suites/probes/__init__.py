"""Probes: properties that need no second implementation, on what is drawn and on what is known to be wrong."""
