"""The loggers, one file each; `setformer_dist.core.callback` is the base class.

build.py         the callbacks that a config names, and those that a user's module registers
optional.py      packages that a logger needs and a run does not
tensorboard.py   TensorBoard
wandb.py         Weights & Biases
mlflow.py        MLflow
"""
