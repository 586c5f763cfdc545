"""Makes profiles: latency and accuracy measured, cost counted, subnets searched.

Imports `gpu_worker`, whose supernets it runs, and `profiles.table`, which it fills. Code that only reads a
profile (the router, the workers) imports `profiles.table` and so needs no torch.
"""
