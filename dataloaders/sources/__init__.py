"""Where samples are: packed and external WebDataset shards, image folders; local or behind a URL.

arrays.py          mapped arrays: all processes of a host share one copy in memory
boxes.py           boxes as people and programs write them
class_folders.py   which images of a folder or tar are of which class
classes.py         class names and labels as people write them
files.py           local files, opened and read so that none can stall a process or take its memory
image_folder.py    an ImageFolder as it is: `<class>/…/image.jpg`, one file per image, without packing
index.py           the index next to a split's shards: where each sample is, and what it must look like
kinds.py           what a folder holds: shards, class folders, or something that a sentence can name
python.py          a data set in Python: any sequence of images with labels, soft labels, masks or boxes
passed.py          files that are skipped: classified, counted, reported in one line
scanning.py        external shards, scanned each by itself, in any process
tar_headers.py     the files in a tar, header by header
tars.py            the samples of a tar, or an error that names the place
foreign.py         external WebDataset shards: indexed when first seen, then read like packed ones
slides.py          whole-slide images in folders, by OpenSlide
subset.py          some samples of a source, as a source of their own
tiles.py           an image as independent tiles in a shard, of which what is seen is read
shards.py          packed shards: `read(i)` is one read at a known position, checked against the index
"""
