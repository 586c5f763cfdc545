"""What runs on each host of a cluster, this machine included: supervisor, and the verbs that drive it.

May import `cluster.spec`, and of that what needs no package beyond those of every host. Data: a `HostPlan` ->
files and processes; their states -> the answers. `bare.py` is sent as text and imports nothing of ours.
"""
