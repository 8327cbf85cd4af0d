"""Molecular dynamics of one system that lives on the ranks which own its atoms."""
