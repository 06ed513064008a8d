"""Which version is in production: versions, aliases, the gate, and the way back."""
