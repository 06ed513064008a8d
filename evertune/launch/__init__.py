"""How evertune starts: the command line."""
