"""The way to a host: shells, what a host has, the package that is sent there, the record of what was done.

May import `cluster.host` and below. Data: a verb and its JSON go over a shell to `cluster.host.onhost`, and
its answer comes back.
"""
