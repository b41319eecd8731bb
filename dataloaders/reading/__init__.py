"""From the order to micro batches: streams, reader threads and processes, damage, the way to the device."""
