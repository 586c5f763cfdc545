"""What runs on each host of a cluster, this machine included: supervisor, and the verbs that drive it.

May import `cluster.spec`, except what needs packages that not every host has. Data: a `HostPlan` -> files
and processes; their states -> the answers. `bare.py` is sent as text and imports only the standard library.
"""
