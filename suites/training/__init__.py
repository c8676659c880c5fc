"""Tests of the losses, of who trains, and of the training guide."""
