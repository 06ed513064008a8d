"""The supervisor of a node and its parts: preflight, start of the ranks, heartbeats, restarts."""
