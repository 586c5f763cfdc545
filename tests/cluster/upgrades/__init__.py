"""Upgrades, drains and scale-downs under load on real engines: `python -m tests.cluster.upgrades`."""
