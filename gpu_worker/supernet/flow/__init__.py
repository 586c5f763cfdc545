"""Follows which channels of the whole network an activation holds, from a cut layer to those after it.

A subnet is followed in its first pass: every tensor carries, for each axis along which it was cut, a layout:
the pieces that it consists of, each the first channels of a piece of the whole network's. So behind a
concatenation, a fused projection or a flattening with channels last, a layer uses the inputs that it is
given, and not its first ones; where it is not known how a tensor came about, the layer that is given a part
of it refuses.

Some calls mean one thing in the whole network and another in the subnet: `view(batch, length, 8, -1)` keeps
the number of heads and cuts each. They are compared with the same call in a pass of the whole network.

Imports torch and the operators. Data: a `Flow` around a pass -> a `Call` for each function of torch -> the
rule for its name -> what its outputs carry, and spans for the operators that are given them.
"""
