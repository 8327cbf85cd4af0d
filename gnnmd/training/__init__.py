"""Training: losses, the Lightning module, a run from data to report."""
