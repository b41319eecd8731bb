""".beton files (FFCV's format), read and written by numpy alone.

reader.py    FFCV's .beton files as a source of samples, without FFCV: `read(i)` is one `pread`, checked
sidecar.py   what a .beton file cannot say of itself: checksums, class names and keys, in a file next to it
writer.py    writes .beton files: JPEG bytes as they are, or raw pixels
format.py    the layout of a .beton file
"""
