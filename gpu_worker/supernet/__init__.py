"""SubNetAct: LayerSelect, WeightSlice and SubnetNorm, inserted into a module and actuated in place.

Imports torch and `superserve`. Data: `insert` -> `Supernet.host` -> `actuate` -> a forward pass reads the
cursor.
"""
