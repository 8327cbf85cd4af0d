"""Potentials from the weights of other packages."""
