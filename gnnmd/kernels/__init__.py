"""Fast GPU versions of functions of `gnnmd.nn`, which stay the readable references and the tests' oracles."""
