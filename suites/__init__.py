"""The suites, by purpose: each folder holds the tests of one question."""
