"""What a run gave: figures, quantiles, the result file, tables, pictures and pages.

Imports `loadgen.traces`. Data: columns of a run, one entry a query -> `result` -> JSON, tables, a page.
"""
