"""What the Open Inference Protocol means: tensors, parameters, errors, descriptions. Pure: no I/O, no clock.

Imports `superserve`'s errors, specs and replies. HTTP and gRPC both end here: JSON with binary tensors
becomes an `InferRequest` in `request`, a gRPC message in `gateway.rpc.mapping`, and an `InferAnswer`
goes back.
"""
