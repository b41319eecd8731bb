"""What runs there are, and where their time went.

show.py   `setformer runs`: what runs there are, how far they came, and where their time went
ran.py    who ran a run: hosts, versions, environment and git state of its attempts
page.py   `setformer runs report`
top.py    `setformer runs top`: what every rank of a running run does
"""
