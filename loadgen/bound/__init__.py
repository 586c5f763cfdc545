"""The best that any schedule could do: an upper bound for every policy, from linear and integer programs.

Imports `loadgen.traces`. `fluid` bounds whole traces; the tests check it against the paper's integer
program.
"""
