"""Packed image data: from an ImageFolder to micro batches that depend on neither ranks nor processes.

What this package promises:

* the samples of a batch, and every pixel of them, are a function of (data, config, seed, step) alone: the same
  for any number of ranks, micro batch size and reader processes, before and after a resumption;
* a damaged byte is found (sizes on opening, checksums and strict decoding on reading), named and counted, and
  never changes what any other place of the stream holds;
* evaluation counts each sample exactly once, on any number of ranks;
* opening data runs no foreign code: shards are plain tar, the index is JSON and safetensors.
"""
