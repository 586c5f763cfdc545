"""Tests of `loadgen.study.advise`."""
