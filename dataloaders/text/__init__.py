"""Texts become token splits: a tokenizer makes ids of words and parts of words.

tokenizer.py   trains a tokenizer, or reads one that exists; special tokens have the same ids everywhere
corpus.py      running text, cut into windows of tokens: for masked language modelling
tables.py      rows of TSV, CSV and JSON lines files: sentences, or pairs, with a class or a number
samples.py     the tokens of a sample, and how pairs that are too long are cut
pack.py        writes a split, with its tokenizer beside it

What trains reads ids alone (`dataloaders.tokens`), and needs no tokenizer.
"""
