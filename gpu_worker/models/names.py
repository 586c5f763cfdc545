"""Names of the supernets that come with the package, for code that must not import torch."""

DIGITS, OFA_RESNET50, DYNABERT = "digits", "ofa-resnet50", "dynabert"

SHIPPED_SUPERNETS = (DIGITS, OFA_RESNET50, DYNABERT)
"""What `--supernet` takes, beside `package.module:attribute`."""
