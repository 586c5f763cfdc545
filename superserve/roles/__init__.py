"""What a process needs to be a role: to start and stop, to be found, to show metrics, to name its version.

Imports `superserve.net` and below; none of the roles themselves. `command` begins and ends every command,
`processes` starts roles on this machine, `local` reads the state files of its clusters, `exposition` serves
metrics over HTTP, `version` identifies the code.
"""
