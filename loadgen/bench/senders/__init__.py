"""Senders and echoes that rows of `make bench` are measured with and against."""
