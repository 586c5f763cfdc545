"""What runs a batch on a device: a CPU or a CUDA engine under one `TorchExecutor`, and kernels for CUDA.

Imports `gpu_worker.supernet`. Data: batch -> staged on the device -> a subnet's graph or forward pass ->
outputs.
"""
