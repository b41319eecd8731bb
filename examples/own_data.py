"""A data set in Python with soft labels: no files, no packing.

python examples/own_data.py
"""

import argparse

import torch

import setformer

CLASSES = ("left", "right")


class Bars(torch.utils.data.Dataset):
    """Images with a bright bar; its position decides how probable "right" is."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, list[float]]:
        # All that is drawn depends on the index: the same index always gives the same sample.
        draw = torch.Generator().manual_seed(self.seed * self.count + index)
        column = int(torch.randint(0, 13, (), generator=draw))
        image = torch.randint(0, 60, (16, 16, 3), generator=draw, dtype=torch.uint8)
        image[:, column : column + 4] += 180
        right = (column + 1) / 14
        return image, int(right > 0.5), [1 - right, right]  # (H, W, 3) uint8, label, soft label


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="runs", help="folder of all runs")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of the run")
    arguments = parser.parse_args()

    data = setformer.own_data(Bars(512, seed=0), Bars(128, seed=1), CLASSES)
    config = setformer.load_config(
        run={"name": "own-data", "out": arguments.out, "log_every": 5},
        model={"name": "setformer_nano", "args": {"stem_strides": [1, 2]}},
        data={"root": "bars", "image_size": 16, "augment": {"crop": "none", "flip": False}},  # root is only a name
        batch={"global_size": 32},
        schedule={"steps": arguments.steps},
        optim={"lr": 1e-3},
        checkpoint={"best_metric": "loss"},
    )
    with setformer.Training(config, data=data) as run:
        run.train()
        print(run.evaluate())
    trained = setformer.load(config.folder)
    print(trained.task.outputs, trained.model(torch.zeros(1, 3, 16, 16)).softmax(dim=1))


if __name__ == "__main__":
    main()
