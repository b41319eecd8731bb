""".beton files (FFCV's format), read and written by numpy alone."""
