"""Engines that choose the machines themselves: Slurm, Ray and Kubernetes, over one base.

A plan here has no addresses: `base` has the verbs and starts what differs, `slurm`, `ray_engine` and
`kubernetes_engine` the few steps that are theirs. `slurm_keeper` and `ray_actor` run beside the role,
wherever that is. Nothing imports `ray` but what runs under `engine: ray`. Imports `cluster.engines`,
`cluster.remote.record` and below.
"""
