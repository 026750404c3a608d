"""A made-up tissue for tests and benchmarks: small, quick, and with something to learn."""
