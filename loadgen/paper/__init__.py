"""The paper's experiments made again, simulated and live, and the page that shows them.

Imports `loadgen.study` and below.
"""
