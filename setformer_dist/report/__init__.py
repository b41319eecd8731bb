"""A page about a run that opens anywhere: one HTML file with no network, no script and no further files.

figures.py   the curves of a report as inline SVG that follows the page's colours
html.py      writes the report: reads a run folder, draws its curves, fills the template
refreshes.py what K-means did to the reference sets, drawn and in a table
rows.py      reading what a run left: metrics.jsonl, config.json, summary.json
sheet.py     a data set's page: figures, classes and pictures, as HTML or PNG
timeline.py  the time line of a run: its attempts on their hosts, faults and saves
"""
