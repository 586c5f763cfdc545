"""What an operator does with a cluster: up, down, restarts, health, doctor, logs, on any number of hosts.

May import `cluster.remote` and below. Data: plan -> `up` -> each host's engine; answers of hosts and router
-> health, doctor, rolling restarts.
"""
