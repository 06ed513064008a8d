"""How evertune starts on many processes: one launcher per file."""
