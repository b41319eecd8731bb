"""The demo and Long Range Arena: whole uses of everything else.

lra.py    `setformer lra`: one small encoder, one attention after the other
"""
