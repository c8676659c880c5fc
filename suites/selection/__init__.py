"""Tests of the discrete choices: what is selected, recorded and replayed."""
