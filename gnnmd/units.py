"""Units: energies in eV, lengths in Angstrom, masses in amu, times in fs at every public door."""

import re

#: Boltzmann constant, eV/K (CODATA 2018, exact).
BOLTZMANN = 8.617333262e-5
#: eV/A^3 in GPa.
GPA_PER_EV_A3 = 160.2176634
#: meV per eV.
MEV = 1e3
#: A femtosecond in A sqrt(amu/eV), the unit of time in which F = m dv/dt holds in eV, A and amu (CODATA 2014,
#: as ASE's: velocities are exchanged with ASE).
FEMTOSECOND = 0.09822694788464063


def seconds(duration: str) -> int:
    """Return the seconds of "[days:]hours:minutes:seconds".

    Raises:
        ValueError: not a time.
    """
    parts = re.fullmatch(r"(?:(\d+):)?(\d+):(\d+):(\d+)", duration.strip())
    if parts is None:
        raise ValueError(
            f"{duration!r} is not a time; write [days:]hours:minutes:seconds, for example 02:30:00"
        )
    days, hours, minutes, rest = (int(p or 0) for p in parts.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest
