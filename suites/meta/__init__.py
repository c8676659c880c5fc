"""Tests of the house, of the records and reports, and of the tests themselves."""
