"""Tests of `loadgen.study.explain`."""
