"""Tests of `cluster.engines`: pure renderers here, real engines in the slow ones."""
