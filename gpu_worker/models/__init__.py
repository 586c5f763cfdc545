"""The supernets that come with the package, by name, and what each is trained, judged and calibrated on.

Imports `gpu_worker.supernet`. `kinds` is the way in: a name -> how to build it, its specs, its weights.
"""
