"""The adversary: evolves workloads until a policy attains as little as possible beside what others attain.

Imports `loadgen.study` and below. Data: `genome` draws, mutates, crosses and builds workloads, `evolve`
searches among them, and `worst` writes the worst as trace files with commands that repeat them.
"""
