"""An emulated GPU that answers with the digest of its input: `python -m tests.e2e.digest_worker`.

Arguments: the router's worker endpoint, the worker's name, a key file or "", and 0 to refuse shared memory.
"""

from __future__ import annotations

import hashlib
import sys
from typing import TYPE_CHECKING

from gpu_worker.cli import WorkerDevice, serve
from gpu_worker.core.batches import Outcome
from gpu_worker.core.link import Gauges
from gpu_worker.core.played import PlayedGpu, PlayedGpus
from gpu_worker.serve.server import Waker
from profiles.table import load_profile
from superserve.net.keys import peer_keys
from superserve.roles.processes import die_with_parent
from superserve.subnet import TensorSpec

if TYPE_CHECKING:
    from superserve.wire import Directive

INPUT = TensorSpec("uint8", (150_528,))
_DIGEST_BYTES = 32


def outcome(directive: Directive, waited_ns: int) -> Outcome:
    """Return the SHA-256 of each input."""
    del waited_ns
    digests = [hashlib.sha256(payload).digest() for payload in directive.payload_list()]
    return Outcome(directive.n, _DIGEST_BYTES, b"".join(digests))


def main(endpoint: str, name: str, keys: str, sharing: str, *, has_parent: bool = True) -> None:
    """Serve until SIGTERM; without `has_parent` also after the process that started it."""
    if has_parent:
        die_with_parent()
    profile = load_profile("cnn-8gpu-modelled")
    gpus = PlayedGpus([PlayedGpu(profile, outcome)])
    device = WorkerDevice(gpus, profile, "", INPUT, TensorSpec("uint8", (_DIGEST_BYTES,)), Gauges)
    with Waker() as waker:
        own = peer_keys(keys, "worker")
        serve([endpoint], name, device, waker, keys=own, shared_memory=sharing != "0")


if __name__ == "__main__":
    main(*sys.argv[1:])
