"""Tests of gpu_worker.training."""
