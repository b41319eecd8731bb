"""The demo and Long Range Arena: whole uses of everything else.

lra.py    `setformer lra`: one small encoder, one attention after the other
demo.py   the demo: scikit-learn's 1,797 handwritten digits as PNG files, packed, trained, summed up for a newcomer
"""
