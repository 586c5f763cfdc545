"""Text in front of a model of token ids: `/v1/embeddings` and `/v1/rerank`, with the model's own tokenizer.

`embeddings` and `rerank` are pure: what a body asks for, and what an answer says; `asks` has what they share.
`tokens` turns texts into rows in threads of its own, so that a long text holds nobody up. `calls` is a
request under way: first in those threads, then at the router.

Imports `gateway.v2` and `gateway.calls`. Data: JSON -> TextAsk -> Tokens -> InferRequest -> Backend ->
InferAnswer -> JSON.
"""
