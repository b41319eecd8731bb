"""From the order to micro batches: streams, reader threads and processes, damage, the way to the device.

ahead.py     micro batches prepared while earlier steps compute
loading.py   what readers do: one request in, the pixels of one micro batch out
readers.py   requests answered by threads of this process, or by processes with threads
"""
