"""SlicedRecurrent: an LSTM, GRU or RNN of which a subnet keeps the first hidden units, in every gate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from gpu_worker.supernet.operators.base import ElasticOperator, first_fits, kept_of_parts, taken, version_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gpu_worker.supernet.operators.base import Spans


class SlicedRecurrent(ElasticOperator):
    """A recurrent layer with as many inputs as it is given and the first hidden units of each gate.

    Both directions and all layers keep equally many units. The kept parts of the gates lie apart, so they are
    copies, one for each size, which are made again after the parameters were written.
    """

    channel_axis = -1
    hidden_size: int
    input_size: int
    _flat_weights: list[torch.Tensor | None]
    _flat_weights_names: list[str]
    bidirectional: bool

    def attach(self, cursor: Any, place: int, path: str) -> None:
        """Become entry `place` of `cursor.settings`; `path` is the layer's name in its model."""
        self.whole = self.hidden_size
        super().attach(cursor, place, path)

    @property
    def n_inputs(self) -> int:
        """Inputs of the layer."""
        return self.input_size

    def consist_of(self, parts: tuple[int, ...]) -> None:
        """Have outputs of a part for each direction."""
        self.parts = parts
        self.whole_parts = (self.whole,) * (2 if self.bidirectional else 1)

    @property
    def n_outputs(self) -> int:
        """Hidden units of one direction."""
        return self.whole

    def kept(self, outputs: int) -> Spans:
        """Return the spans of the outputs: the first hidden units of each direction."""
        return kept_of_parts((self.whole,) * (2 if self.bidirectional else 1), outputs)

    def forget(self) -> None:
        """Drop all copies."""
        self.copies: dict[Any, list[torch.Tensor]] = {}

    @property
    def copied_bytes(self) -> int:
        """Bytes of all copies."""
        return sum(part.numel() * part.element_size() for copy in self.copies.values() for part in copy)

    def _now(self) -> Sequence[torch.Tensor | None]:
        return list(self.__dict__["_parameters"].values())

    def _used(self) -> Sequence[torch.Tensor | None]:
        return self._now()

    def look(self) -> None:
        """Drop the copies if a parameter was written or replaced."""
        held = self._now()
        if len(held) != len(self.held) or version_of(*held) != self.written:
            self.renew()
        super().look()

    def renew(self) -> None:
        """Drop all copies, and note of which parameters the next ones will be."""
        super().renew()
        self.written = version_of(*self._now())

    def forward(self, x: Any, hx: Any = None) -> Any:
        """Run with the actuated sizes; takes and returns what torch's own layer does, of that width."""
        data = x.data if isinstance(x, PackedSequence) else x
        units, inputs = self.cursor.settings[self.place], data.shape[-1]
        attributes = self.__dict__
        before = {name: attributes[name] for name in ("_flat_weights", "hidden_size", "input_size")}
        weights = self._weights(units, inputs, self.spans)
        attributes.update(_flat_weights=weights, hidden_size=units, input_size=inputs)
        try:
            return super().forward(x, hx)  # type: ignore[misc]  # torch's own, beside which this is mixed in
        finally:
            attributes.update(before)

    def _update_flat_weights(self) -> None:
        """Leave the weights as `forward` has set them, where torch would take the whole layer's again."""

    def _weights(self, units: int, inputs: int, spans: Spans | None) -> list[torch.Tensor]:
        first_fits(self.path, "inputs", inputs, self.whole_inputs)
        whole = [getattr(self, name) for name in self._flat_weights_names]
        if (units, inputs) == (self.whole, self.whole_inputs):
            return whole
        if torch.is_grad_enabled():
            return self._cut(whole, units, inputs, spans)
        self.look()
        key = (units, inputs, spans)
        if key not in self.copies:
            self.copies[key] = self._cut([weight.detach() for weight in whole], units, inputs, spans)
        return self.copies[key]

    def _cut(
        self, whole: Sequence[torch.Tensor], units: int, inputs: int, spans: Spans | None
    ) -> list[torch.Tensor]:
        found = []
        for name, weight in zip(self._flat_weights_names, whole, strict=True):
            gates = len(weight) // self.whole
            rows = kept_of_parts((self.whole,) * gates, units)
            weight = taken(weight, 0, rows)
            if name.startswith("weight_hh"):
                weight = weight[:, :units]
            elif name.startswith("weight_ih"):
                is_first = name.removeprefix("weight_ih_l").partition("_")[0] == "0"
                weight = taken(weight, 1, (spans or ((0, inputs),)) if is_first else self.kept(units))
            found.append(weight.contiguous())
        return found


class SlicedRNN(SlicedRecurrent, nn.RNN):
    """An Elman RNN."""


class SlicedLSTM(SlicedRecurrent, nn.LSTM):
    """An LSTM."""


class SlicedGRU(SlicedRecurrent, nn.GRU):
    """A GRU."""
