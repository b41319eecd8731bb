"""The page of a queue, its JSON API and its figures for Prometheus; a process of its own beside the scheduler.

access.py   who may read and act: token, sessions, hosts, origins; the headers of every answer
api.py      the JSON API
app.py      the application: routes, errors, sizes
curves.py   the curves of a run while it grows, as inline SVG
figures.py  what Prometheus reads at /metrics
live.py     server-sent events: that something has changed
models.py   what the JSON API takes and gives
overview.py what the pages show, from rows of the database
pages.py    the pages and the forms that act
server.py   listens, and runs the application, alone or as a child of `setformer queue serve`

The browser's part is files/: templates, one style sheet, one script. No file comes from elsewhere.
"""
