"""FFCV's own loader as a second engine.

check.py      whether FFCV can be used here
pipeline.py   FFCV's loader driven by our order: which samples, which crops, which are damaged
engine.py     `data.engine = "ffcv"`: our order, our crops and our rules for damage, decoded by FFCV
"""
