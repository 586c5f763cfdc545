"""Names of the supernets that come with the package, for code that must not import torch."""

DIGITS, OFA_RESNET50, DYNABERT = "digits", "ofa-resnet50", "dynabert"
OFA_MOBILENET_V3, OFA_MOBILENET_V3_W12 = "ofa-mobilenet-v3", "ofa-mobilenet-v3-w1.2"
BERT_ENCODER, BERT_RERANKER = "bert-encoder", "bert-reranker"

SHIPPED_SUPERNETS = (
    DIGITS, OFA_RESNET50, DYNABERT, OFA_MOBILENET_V3, OFA_MOBILENET_V3_W12, BERT_ENCODER, BERT_RERANKER,
)  # fmt: skip
"""What `--supernet` takes, beside `package.module:attribute`."""


def is_known(supernet: str) -> bool:
    """Return whether `--supernet` takes this: a shipped one, perhaps with options, or your own."""
    return ":" in supernet or supernet.partition("@")[0] in SHIPPED_SUPERNETS


def with_example(supernet: str, example: str | None) -> str:
    """Return what `--supernet` and `--example-input` come to: a name such as `module:build@3x8x8:float32`."""
    return supernet if example is None else f"{supernet}@{example}"
