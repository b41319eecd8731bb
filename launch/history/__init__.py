"""What runs there are, and where their time went.

show.py   `setformer runs`: what runs there are, how far they came, and where their time went
top.py    `setformer runs top`: what every rank of a running run does
"""
