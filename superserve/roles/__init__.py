"""What a process needs to be a role: to start and stop, to be found, to show metrics, to name its version.

Imports `superserve.net` and below; none of the roles themselves. `processes` starts them on this machine,
`local` knows the state files of its clusters, `exposition` serves metrics over HTTP, `version` names the
code.
"""
