"""Mutants: one-line faults in the router's core, the client's session and the worker's core; `make mutants`.

A test that passes proves something only if it could have failed. Each mutant is a fault that a person might
write; the unit tests of its folder must notice it, alone: without processes, end-to-end tests or chaos.

    mutant.py                      what a mutant is, and whether it still applies
    router.py client.py worker.py  the mutants, by the role that they break
    table.py                       all of them
    run.py                         copies the tree, applies one mutant to a copy, runs its tests there

After a refactoring, `python -m tests.mutants --list` names the stale ones: give each the line as it is now.
"""
