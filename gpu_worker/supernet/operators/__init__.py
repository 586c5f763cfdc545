"""SubNetAct's operators: one resident supernet, any subnet of it in place.

An operator is an ordinary torch layer whose class was changed: `WeightSliceConv2d` is an
`nn.Conv2d`, `SubnetNorm2d` an `nn.BatchNorm2d`, with the same parameters under the same names. So a
checkpoint loads before and after insertion, and code that looks for `nn.Conv2d` still finds it.

All operators of a supernet share one `Cursor`. Its `settings` are one tuple with an entry for
each operator: outputs that are kept, a switch, a pair of statistics. A subnet is such a tuple,
and actuation is one store of it.

Only outputs are chosen, or a kernel size or a resolution in the layers of `chosen`. Inputs follow the
activation: a layer that is given 48 channels uses the first 48 of its inputs, a norm the first 48 of its
scales, a depthwise convolution the first 48 of its groups. So you need not declare which layer feeds which,
and residual streams work. Behind a concatenation or a fused projection they are not the first 48:
`gpu_worker.supernet.flow` finds out which.

Source: SubNetAct, SuperServe (NSDI '25).
"""

from __future__ import annotations

from gpu_worker.supernet.operators.base import (
    Cursor,
    ElasticOperator,
    Operator,
    Parameters,
    Prepared,
    operators_in,
)
from gpu_worker.supernet.operators.norms import (
    NormCalibration,
    SlicedLayerNorm,
    Statistics,
    SubnetNorm,
    SubnetNorm1d,
    SubnetNorm2d,
    SubnetNorm3d,
    normed,
)
from gpu_worker.supernet.operators.slices import (
    WeightSlice,
    WeightSliceConv1d,
    WeightSliceConv2d,
    WeightSliceConv3d,
    WeightSliceLinear,
    is_packed_already,
)
from gpu_worker.supernet.operators.switch import LayerSelect, Skip, Skipped, Switched, switched

__all__ = [
    "Cursor",
    "ElasticOperator",
    "LayerSelect",
    "NormCalibration",
    "Operator",
    "Parameters",
    "Prepared",
    "Skip",
    "Skipped",
    "SlicedLayerNorm",
    "Statistics",
    "SubnetNorm",
    "SubnetNorm1d",
    "SubnetNorm2d",
    "SubnetNorm3d",
    "Switched",
    "WeightSlice",
    "WeightSliceConv1d",
    "WeightSliceConv2d",
    "WeightSliceConv3d",
    "WeightSliceLinear",
    "is_packed_already",
    "normed",
    "operators_in",
    "switched",
]
