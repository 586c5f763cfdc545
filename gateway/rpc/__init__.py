"""gRPC: the service `inference.GRPCInferenceService`, in processes of its own.

`messages` are the classes of inference.proto, `mapping` turns them into what `gateway.v2` knows and back,
`server` is grpcio's side of it. A query over gRPC costs several times what it costs over HTTP, most of it in
grpcio.

Imports `gateway.v2` and `gateway.calls`.
"""
