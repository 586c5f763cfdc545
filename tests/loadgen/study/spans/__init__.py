"""Tests of `loadgen.study.spans`."""
