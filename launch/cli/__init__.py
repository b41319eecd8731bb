"""The commands and their options, with Typer.

bars.py      a progress bar
ckpt.py      `setformer ckpt`: looking at checkpoints, checking them, taking them elsewhere, making room
data.py      `setformer data`: making, checking and looking at the data that training reads
lra.py       `setformer lra`: Long Range Arena, from the data to the table
main.py      `setformer`: one command for packing, training, evaluation and looking at what came out
options.py   arguments and options that several commands have
plan.py      `setformer plan`: a run on machines that are not there
queue.py     `setformer queue`: a queue for a cluster that several people share
runs.py      `setformer runs`: looking at runs
stopped.py   what Ctrl-C leaves
sweep.py     `setformer sweep`: many runs over a space of configs
text.py       `setformer text`: tokenizers, and texts as packed tokens
trained.py   `setformer eval`, `probe` and `predict`: a trained checkpoint, scored and used
usage.py     what is said of words that no command takes
"""
