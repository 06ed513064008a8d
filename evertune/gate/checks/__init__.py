"""The checks of the gate, each a pure function of predictions and a limit; a limit of None skips the check."""
