"""Making, checking, converting and looking at packed data.

catalog.py      what is to be packed, as an SQLite table in bounded memory
coco.py         COCO's instance annotations: the boxes of each image, classes numbered from 0
convert.py      shards to .beton and back, and anything that can be packed straight to .beton
finding.py      from a source that a user names to the samples to be packed, in their final order
hold_out.py     one source becomes a training set and a validation set, by class
inspection.py   what a split holds: counts, classes, sizes, formats, duplicates, pictures
intake.py       an image on its way into a shard: bytes kept as they are wherever possible
mask_table.py   what the values or colours of mask files stand for
origins.py      where the samples of a packing come from: files of images, or another container of samples
overlap.py      samples that lie in two splits
pack.py         packing: from a source to shards with an index
rows.py         what the index will say of each shard, kept next to it until all are whole
shard_file.py   a shard being written, with its sha256
text.py         packing labelled texts: each byte is a token
statistics.py   mean and standard deviation of the bands of images
throughput.py   how fast this data loads on this machine, where the time of an image goes, and what would help
verify.py       reading data whole: is every byte still what was packed, does every image decode
"""
