"""The cluster: processes on hosts, started, watched and stopped together."""
