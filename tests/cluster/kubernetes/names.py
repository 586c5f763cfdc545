"""Answers the names of Services, as a cluster's DNS does: `python names.py ADDRESS KUBECONFIG`.

NAME.NAMESPACE.svc.cluster.local is a Service's own address, or its pods' addresses if it is headless; a
StatefulSet's pod has its own name before that.
It asks the API each time a name is asked for, half a second at most after the last. Debian has no CoreDNS.
"""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import struct
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

_SUFFIX = ".svc.cluster.local"
_LOOK_S = 0.5
_TTL_S = 1
_A, _NO_SUCH_NAME = 1, 3


class Names:
    """The addresses of every Service.

    Args:
        server: The API's URL.
        token: What it takes.
    """

    def __init__(self, server: str, token: str) -> None:
        self._server, self._token = server, token
        self._context = ssl._create_unverified_context()
        self._found: dict[str, list[str]] = {}
        self._looked_s = 0.0

    def addresses(self, name: str) -> list[str] | None:
        """Return the addresses of a name; None if there is none of it."""
        if time.monotonic() - self._looked_s > _LOOK_S:
            with contextlib.suppress(urllib.error.URLError, OSError, ValueError):
                self._found = self._look()
                self._looked_s = time.monotonic()
        return self._found.get(name.removesuffix(_SUFFIX)) if name.endswith(_SUFFIX) else None

    def _look(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for each in self._get("services"):
            address = each["spec"].get("clusterIP", "None")
            found[_key(each)] = [] if address == "None" else [address]
        for each in self._get("endpoints"):
            for subset in each.get("subsets") or ():
                if _key(each) in found and not _is_fixed(found[_key(each)]):
                    both = (*subset.get("addresses", ()), *subset.get("notReadyAddresses", ()))
                    found[_key(each)] += [one["ip"] for one in both]
                    found |= {
                        f"{one['hostname']}.{_key(each)}": [one["ip"]] for one in both if "hostname" in one
                    }
        return found

    def _get(self, kind: str) -> list[dict[str, Any]]:
        asked = urllib.request.Request(
            f"{self._server}/api/v1/{kind}", headers={"Authorization": f"Bearer {self._token}"}
        )
        with urllib.request.urlopen(asked, timeout=2, context=self._context) as answer:
            items: list[dict[str, Any]] = json.load(answer)["items"]
            return items


def _key(each: dict[str, Any]) -> str:
    return f"{each['metadata']['name']}.{each['metadata']['namespace']}"


def _is_fixed(addresses: list[str]) -> bool:
    return any(address.startswith("10.96.") for address in addresses)


def answer(query: bytes, names: Names) -> bytes:
    """Return the answer to a question: addresses of IPv4, nothing for other kinds, or no such name."""
    labels, at = [], 12
    while length := query[at]:
        labels.append(query[at + 1 : at + 1 + length].decode("ascii", "replace"))
        at += 1 + length
    (kind,) = struct.unpack(">H", query[at + 1 : at + 3])
    question = query[12 : at + 5]
    found = names.addresses(".".join(labels).lower())
    given = found or [] if kind == _A else []
    flags = 0x8580 | (_NO_SUCH_NAME if found is None else 0)
    head = query[:2] + struct.pack(">HHHHH", flags, 1, len(given), 0, 0)
    records = b"".join(
        struct.pack(">HHHIH", 0xC00C, _A, 1, _TTL_S, 4) + socket.inet_aton(address) for address in given
    )
    return head + question + records


def main(address: str, kubeconfig: str) -> None:
    """Answer until the end."""
    config = json.loads(Path(kubeconfig).read_text(encoding="utf-8"))  # JSON is YAML, so the rig writes that
    names = Names(config["clusters"][0]["cluster"]["server"], config["users"][0]["user"]["token"])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((address, 53))
        while True:
            query, peer = server.recvfrom(512)
            with contextlib.suppress(IndexError, struct.error):
                server.sendto(answer(query, names), peer)


if __name__ == "__main__":
    main(*sys.argv[1:])
