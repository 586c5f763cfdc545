"""Engines that people already run, and what each is given: one description of a cluster, several renderers.

`describe` turns hosts.yaml into roles without an engine in them; each renderer turns that into the text that
its engine takes, and refuses, by file, line and field, what its engine cannot express. Renderers are pure:
the files that they read are those that `describe` has read. Imports `cluster.spec` and below.
"""
