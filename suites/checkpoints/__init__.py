"""Tests of files: what is written, what is read, and what is refused."""
