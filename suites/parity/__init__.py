"""Tests that the models compute the same numbers, by every road that must lead to them."""
