"""A page about a run that opens anywhere: one HTML file with no network, no script and nothing beside it."""
