"""From the order to micro batches: streams, reader threads and processes, damage, the way to the device.

ahead.py     micro batches prepared while earlier steps compute
loading.py   what readers do: one request in, the pixels of one micro batch out
readers.py   requests answered by threads of this process, or by processes with threads
damage.py    what a damaged training sample does: it is replaced, named and counted, and never changes a count
device.py    from a micro batch of bytes on the CPU to what a model and a loss take, on the device
streams.py   the training and the evaluation stream: requests cut from the global order, answered by readers
"""
