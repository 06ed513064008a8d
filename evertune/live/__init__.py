"""Periodic updates from a stream, as transactions: what arrived, a checked new version, or the old one as it was."""
