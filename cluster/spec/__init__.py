"""What a cluster is to be: hosts.yaml and command lines, checked, as roles, files and keys for each host.

The lowest floor. Pure except for the files that it reads: options or a hosts file in, a plan or errors out.
"""
