"""Measured against peers, one JSON line per record."""
