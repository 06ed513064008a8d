"""Small helpers used by all packages."""
