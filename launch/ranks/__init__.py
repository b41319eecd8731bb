"""The processes of a run: starting, watching, ending and restarting them."""
