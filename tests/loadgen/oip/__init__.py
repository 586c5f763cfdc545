"""Tests of runs against servers of the Open Inference Protocol."""
