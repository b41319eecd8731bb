"""Which sample is where: permutations, plans, mixtures, resolutions. Pure functions.

mixture.py       several data sets with shares: which set a position belongs to, and which sample
order.py         which sample is where: a pure function of (samples, seed, epoch, step)
permutation.py   a keyed permutation without a table: the same cost at any size
repeated.py      each image several times in a global batch
resolution.py    the size of training images: a pure function of the optimizer step and of the shape of its batch
plans.py         which plan a config asks for: the one place that puts orders, shares and buckets together
"""
