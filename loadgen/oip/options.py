"""Where a run's queries go and what they carry: `--target`, `--inputs` and `--labels`, declared once."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loadgen.live.run import Emulation, RunSettings
from loadgen.live.targets import payload_bytes_of, target_of
from loadgen.oip.inputs import checked_answers, read_inputs
from loadgen.oip.model import EXPECTED, is_url, target_model
from loadgen.oip.run import check_installed
from superserve.errors import ConfigError
from superserve.net.connection import ask_status

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpu_worker.core.played import Pace
    from loadgen.oip.inputs import CheckedAnswers, LabelledInputs
    from loadgen.results.run import Run

_TARGET = click.option(
    "--target", metavar="URL",
    help="http://HOST:PORT/v2/models/M/infer or grpc://HOST:PORT/M: a server of the Open Inference Protocol; "
    "or superserve://HOST:PORT.",
)  # fmt: skip
_INPUTS = click.option(
    "--inputs", type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Send the rows of `input` in this .npz file, drawn at random.",
)  # fmt: skip
_LABELS = click.option(
    "--labels", "is_labelled", is_flag=True, help="Compare the answers with `labels` in that file."
)


@dataclass(frozen=True, slots=True)
class GivenInputs:
    """The options, as given."""

    url: str | None
    path: Path | None
    is_labelled: bool

    def read(self) -> LabelledInputs | None:
        """Return the inputs in the file; None without one.

        Raises:
            ConfigError: The file is not what it should be, or labels were asked for without one.
        """
        if self.path is None:
            if self.is_labelled:
                raise ConfigError("--labels: expected --inputs, the file that has them")
            return None
        return read_inputs(self.path, is_labelled=self.is_labelled)

    def target(
        self, connect: str | None, emulate: str | None, policy: str | None, logs: Path | None, pace: Pace
    ) -> Emulation | str:
        """Return where queries go: a private cluster, a router's endpoint, or a server's URL.

        Raises:
            ConfigError: The options exclude each other, or name something that does not exist.
        """
        url = self.url
        if url is not None and (connect is not None or emulate is not None):
            raise ConfigError("--target: expected alone, without --connect and --emulate")
        if self.is_labelled and emulate is not None:
            raise ConfigError("--labels: emulated GPUs compute nothing; expected a real model")
        if url is None or url.startswith("superserve://"):
            return target_of(
                connect if url is None else url.partition("://")[2], emulate, policy, logs, pace=pace
            )
        if not is_url(url):
            raise ConfigError(f"--target: {EXPECTED}, got {url!r}")
        target_of("127.0.0.1:1", None, policy, logs, pace=pace)  # refuses what only a private cluster takes
        check_installed(url)
        return url


def input_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command --target, --inputs and --labels, and pass it all as `given`."""

    @functools.wraps(command)
    def with_inputs(*, target: str | None, inputs: Path | None, is_labelled: bool, **options: Any) -> None:
        command(given=GivenInputs(target, inputs, is_labelled), **options)

    return _TARGET(_INPUTS(_LABELS(with_inputs)))


def settings_of(
    target: Emulation | str, inputs: LabelledInputs | None, payload_bytes: int | None, slo_ns: int,
    *, senders: int, seed: int, keys: str,
) -> RunSettings:  # fmt: skip
    """Return how a trace is offered: with real inputs, or with payloads as long as the model takes.

    Raises:
        ConfigError: The target does not say what its model takes.
    """
    if inputs is not None:
        if payload_bytes is not None:
            raise ConfigError("--inputs and --payload-bytes: expected one of them, got both")
        n_bytes = inputs.payloads.shape[1]
    elif payload_bytes is not None:
        n_bytes = payload_bytes
    elif is_url(target):
        n_bytes = target_model(str(target)).payload_bytes
    else:
        n_bytes = payload_bytes_of(target, keys)
    return RunSettings(
        slo_ns, senders, n_bytes, None if inputs is None else inputs.payloads, seed,
        keep_outputs=inputs is not None and inputs.labels is not None, keys=keys,
    )  # fmt: skip


def check_answers(
    run: Run, inputs: LabelledInputs | None, target: Emulation | str, settings: RunSettings
) -> CheckedAnswers | None:
    """Compare the answers with the labels; None if that was not asked for."""
    if inputs is None or inputs.labels is None:
        return None
    assert not isinstance(target, Emulation), "refused before"
    return checked_answers(run, inputs.labels, settings.slo_ns, _output_dtype(target, settings.keys))


def _output_dtype(target: str, keys: str) -> str:
    if is_url(target):
        return target_model(target).output_dtype
    model = ask_status(target, keys=keys).model
    return "float32" if model is None or model.output is None else model.output.dtype
