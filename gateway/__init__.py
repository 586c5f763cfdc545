"""The gateway: the Open Inference Protocol (KServe v2), over HTTP and gRPC, in front of a router.

A role of its own: `python -m gateway`. One process watches. The others share a port for HTTP and one for
gRPC, and each holds one `superserve.AsyncClient`. The router never sees HTTP.

    v2/      what the protocol means: tensors, parameters, errors, descriptions; pure
    calls/   a request's way to the router, who may call, shared counters
    text/    texts in front of a model of token ids: embeddings and reranking
    http/    HTTP/1.1: bytes in, requests out, answers in order; and the asyncio protocol around it
    rpc/     gRPC: the messages of inference.proto, and the service
    serve/   processes: start, restart, drain, metrics

Imports `superserve` only. Data: bytes -> http or rpc -> v2.request -> calls.backend -> AsyncClient -> Reply
-> v2.answer -> bytes.
"""
