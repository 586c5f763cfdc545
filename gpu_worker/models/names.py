"""Names of the supernets that come with the package, for those who must not wait for torch."""

DIGITS, OFA_RESNET50, DYNABERT = "digits", "ofa-resnet50", "dynabert"

SHIPPED_SUPERNETS = (DIGITS, OFA_RESNET50, DYNABERT)
"""What `--supernet` takes, beside `package.module:attribute`."""
