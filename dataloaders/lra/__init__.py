"""Long Range Arena (Tay et al., ICLR 2021): its six tasks as packed token splits, made or read here.

    listops, pathfinder, pathx     generated from a seed
    image                          read from CIFAR-10 as an ImageFolder
    text, retrieval                read from the public files of IMDB and AAN

Everything ends as `dataloaders.tokens.TokenSplit`: a folder per split that the ordinary streams read.

    generating.py   generated tasks, each candidate a function of (seed, number) alone
    readers.py      samples from public files: CIFAR-10 as an ImageFolder, IMDB as aclImdb or TSV, AAN as TSV pairs
    stats.py        statistics of a prepared task, next to those published for ListOps
    listops.py      ListOps: nested MIN, MAX, MED and SM of digits
    pathfinder.py   Pathfinder: whether two marked points are on one path
    tasks.py        the six tasks, full-size and shortened, and how each becomes packed splits train, val and test
"""
