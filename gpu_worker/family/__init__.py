"""Families: ordinary models of different size, served as the subnets of one profile. No supernet is needed.

A family file lists the members: an ONNX file, a `torch.export` file, or a function that returns a module.
All are resident at once, and actuation is choosing one. May import torch, `superserve`, `gpu_worker.engines`
and what builds and loads a module: `gpu_worker.models.factory` and `gpu_worker.supernet.checkpoints`.

Data: family.yaml -> `file` -> an opened member each -> what they take and give, compared (`packing`) ->
`proof` -> resident -> `engine`, behind the same `PaddedExecutor` as a supernet.
"""
