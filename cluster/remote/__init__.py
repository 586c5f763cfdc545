"""The way to a host: shells, what a host has, the package that is sent there, what is remembered of it.

May import `cluster.host` and below. Data: a verb and its JSON go over a shell to `cluster.host.onhost`, and
its answer comes back.
"""
