"""Texts in front of a model of token ids."""
