"""What looks after the ranks of a node: preflight, start, heartbeats, restart."""
