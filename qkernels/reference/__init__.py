"""The meaning of every op in plain torch: the oracle of the tests, and the kernel of last resort on any device."""
