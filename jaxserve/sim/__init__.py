"""Stand-ins for what a simulation and the tests cannot have for real. NumPy and the standard library only."""
