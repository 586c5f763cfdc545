"""Tests of `cluster.web`."""
