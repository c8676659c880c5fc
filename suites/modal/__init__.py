"""`modal run` for real, offline: Modal's own client and container runtime, against a server that the tests start."""
