"""Engines that choose the machines."""
