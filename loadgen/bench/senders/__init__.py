"""Senders that measure rows of `make bench`, and the echo that they are compared with."""
