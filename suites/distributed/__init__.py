"""Tests of the model on several ranks, each a process of this machine."""
