"""Tests of the fused operators, each against the plain formula."""
