"""What `setformer data` does.

commands.py   what `setformer data index`, `verify` and `bench` do and print
sheet.py      what `setformer data inspect` shows: a table in the terminal, JSON, or a contact sheet
"""
