"""Tests of the adversary."""
