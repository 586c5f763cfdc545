"""kubectl, as this machine has it, in one namespace of one context; errors quote what it printed.

It is the way in because people have set it up: contexts, credentials and their plugins.
"""

from __future__ import annotations

import contextlib
import json
import re
import select
import subprocess
import time
from typing import TYPE_CHECKING, Any

from cluster.remote.shell import RemoteError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_COMMAND_S = 60.0  # deletions wait for what they delete
_FORWARD_S = 10.0
_FORWARDING = re.compile(rb"Forwarding from 127\.0\.0\.1:(\d+) -> ")
_ENDED_S = 5.0


class Kubectl:
    """Runs kubectl.

    Args:
        namespace: Where every object is.
        context: Of kubectl's configuration; None for the current one.
    """

    def __init__(self, namespace: str, context: str | None) -> None:
        at = () if context is None else (f"--context={context}",)
        self._words = ("kubectl", *at, f"--namespace={namespace}")

    def apply(self, objects: Sequence[dict[str, Any]]) -> None:
        """Create objects, or change those that differ.

        Raises:
            RemoteError: Kubernetes refuses one, or does not answer.
        """
        body = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        self.call("apply", "--filename=-", stdin=json.dumps(body))

    def get(self, kinds: str, selector: str) -> list[dict[str, Any]]:
        """Return the objects that have these labels."""
        text = self.call("get", kinds, f"--selector={selector}", "--output=json")
        try:
            found: list[dict[str, Any]] = json.loads(text)["items"]
        except (ValueError, KeyError, TypeError):
            raise RemoteError(f"kubectl get {kinds}: expected a list in JSON, got {text[:200]!r}") from None
        return found

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects, each as KIND/NAME, if they are there; return once they are gone."""
        names = list(names)
        if names:
            self.call("delete", "--ignore-not-found", "--cascade=foreground", *names)

    def delete_all(self, kinds: str, selector: str) -> None:
        """Delete every object of these kinds that has these labels."""
        self.call("delete", kinds, f"--selector={selector}", "--ignore-not-found")

    def scale(self, name: str, n: int) -> None:
        """Let KIND/NAME have `n` pods."""
        self.call("scale", name, f"--replicas={n}")

    def versions(self) -> set[str]:
        """Return the versions of its API: "policy/v1", ..."""
        return set(self.call("api-versions").split())

    def follow(self, name: str, n_lines: int) -> subprocess.Popen[bytes]:
        """Start what prints the log of a pod of KIND/NAME; the caller ends it."""
        words = [*self._words, "logs", name, f"--tail={n_lines}", "--follow"]
        return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)

    def call(self, *args: str, stdin: str = "") -> str:
        """Run a command; return what it printed.

        Raises:
            RemoteError: kubectl is not installed, fails, or does not end in time.
        """
        try:
            done = subprocess.run(
                [*self._words, *args], input=stdin, capture_output=True, text=True, timeout=_COMMAND_S,
                check=False,
            )  # fmt: skip
        except FileNotFoundError:
            raise RemoteError("kubectl: not found: `engine: kubernetes` needs it here, set up") from None
        except subprocess.TimeoutExpired:
            raise RemoteError(f"kubectl {args[0]}: no answer within {_COMMAND_S:g} s") from None
        if done.returncode:
            words = "; ".join(done.stderr.strip().splitlines()[-3:]) or "nothing was written"
            raise RemoteError(f"kubectl {' '.join(args)}: exit code {done.returncode}: {words}")
        return done.stdout

    def forward(self, pod: str, port: int) -> Forward:
        """Return a port of this machine that leads to a port of a pod."""
        return Forward([*self._words, "port-forward", "--address=127.0.0.1", f"pod/{pod}", f":{port}"])


class Forward:
    """A port of this machine that leads to a pod, as long as the pod lives; `endpoint` is "" without one.

    Args:
        words: The command.

    Attributes:
        endpoint: Where to connect.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self.endpoint = self._read()

    def is_alive(self) -> bool:
        """Return whether it still leads there, as far as this end knows."""
        return bool(self.endpoint) and self._process.poll() is None

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_ENDED_S)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None, "it was started with a pipe"
        self._process.stdout.close()

    def _read(self) -> str:
        """Wait for the line with the port; return "" if there is none, as for a pod that does not run."""
        assert self._process.stdout is not None, "it was started with a pipe"
        give_up_s = time.monotonic() + _FORWARD_S
        while (left_s := give_up_s - time.monotonic()) > 0:
            if not select.select([self._process.stdout], [], [], left_s)[0]:
                return ""
            line = self._process.stdout.readline()
            if found := _FORWARDING.match(line):
                return f"tcp://127.0.0.1:{int(found[1])}"
            if not line:
                return ""
        return ""
