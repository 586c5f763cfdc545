"""A worker process: the server that owns the socket, and the GPUs behind it, real or emulated.

Imports `gpu_worker.core`. Data: DIRECTIVE -> server -> compute thread or emulated GPU -> Finished -> DONE.
"""
