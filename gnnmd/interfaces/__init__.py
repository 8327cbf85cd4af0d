"""Doors to other programs: the ASE calculator and ASE-driven molecular dynamics."""
