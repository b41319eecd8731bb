"""What `setformer ckpt` does.

convert.py    `setformer ckpt convert`: weights in a pickle of torch (.pth, .pt, .bin) as a .safetensors file
export.py     `setformer ckpt export`: a folder that plain timm loads, preprocessing included
listing.py    `setformer ckpt ls` and `show`: the checkpoints of a run as a table, and one of them in full
diff.py       `setformer ckpt diff`: in which parameters, metrics and config keys two checkpoints differ
prune.py      `setformer ckpt prune`: delete the checkpoints that retention does not keep
transfer.py   `setformer ckpt export --deepspeed` and `import`: to and from DeepSpeed's own form
stored.py     `setformer ckpt ls`, `verify` and `fetch` of copies in an object store
verify.py     `setformer ckpt verify`: every byte of checkpoints read
progress.py   a bar over the bytes that are read
"""
