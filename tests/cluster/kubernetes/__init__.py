"""A real Kubernetes on one machine, built from Debian's source, in network namespaces: `make kubernetes`."""
