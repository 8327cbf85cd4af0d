"""Units: energies in eV, lengths in Angstrom, masses in amu, times in fs at every public door."""

#: Boltzmann constant, eV/K (CODATA 2018, exact).
BOLTZMANN = 8.617333262e-5
#: eV/A^3 in GPa.
GPA_PER_EV_A3 = 160.2176634
#: meV per eV.
MEV = 1e3
#: A femtosecond in A sqrt(amu/eV), the unit of time in which F = m dv/dt holds in eV, A and amu (CODATA 2014,
#: as ASE's: velocities are exchanged with ASE).
FEMTOSECOND = 0.09822694788464063
