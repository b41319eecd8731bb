"""What `setformer ckpt` does.

convert.py    `setformer ckpt convert`: weights in a pickle of torch (.pth, .pt, .bin) as a .safetensors file
export.py     `setformer ckpt export`: a folder that plain timm loads, preprocessing included
listing.py    `setformer ckpt ls` and `show`: the checkpoints of a run as a table, and one of them in full
transfer.py   what `setformer ckpt verify | diff | export | import | prune` do
"""
