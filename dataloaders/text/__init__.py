"""Texts become token splits: a tokenizer makes ids of words and parts of words.

tokenizer.py   trains a tokenizer, or reads one that exists; special tokens have the same ids everywhere
corpus.py      running text, cut into windows of tokens: for masked language modelling
tables.py      rows of TSV, CSV and JSON lines files: sentences, or pairs, with a class or a number
pack.py        writes a split, with its tokenizer beside it

What trains reads ids alone (`dataloaders.tokens`), and needs no tokenizer.
"""
