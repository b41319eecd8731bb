"""Which sample is where: permutations, plans, mixtures, resolutions. Pure functions."""
