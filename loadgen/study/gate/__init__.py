"""The gate: what a policy must hold, in 200 cells, before it may be the default; every judgement is listed.

Imports `loadgen.study` and below. Data: `cells` make workloads, `run` serves them under the candidate and
the comparators, whose figures `store` keeps, `promise` says which lines hold, `judgements` lists verdicts.
"""
