"""`make bench`: every budget as a figure, a ratio where a reference ran beside it; rows/ and senders/.

Imports any floor below, and the parts of router and worker that a row times on their own.
"""
