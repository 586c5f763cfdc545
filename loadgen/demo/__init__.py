"""`make demo`: a real small supernet on this machine's CPU, a bursty trace, a table and a page.

Imports any floor below.
"""
