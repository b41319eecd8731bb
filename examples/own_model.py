"""A model and an augmentation of one's own.

python examples/own_model.py --data runs/demo-data
"""

import argparse

import torch
from torch import nn

import setformer


class Patches(nn.Module):
    """A small network on 4 x 4 patches: enough for digits."""

    def __init__(self, outputs: int, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, kernel_size=4, stride=4)
        self.mix = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.head = nn.Linear(width, outputs)

    def forward(self, images: torch.Tensor) -> torch.Tensor:  # (m, 3, H, W) -> (m, outputs)
        tokens = self.embed(images).flatten(2).transpose(1, 2)
        return self.head((tokens + self.mix(tokens)).mean(dim=1))


def darken(image: torch.Tensor, key: int) -> torch.Tensor:
    """Scale the brightness. What is drawn comes from the key, so the run is the same on any machine."""
    factor = 0.6 + 0.4 * torch.rand((), generator=torch.Generator().manual_seed(key))
    return (image.float() * factor).to(torch.uint8)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", default="runs/demo-data", help="folder of packed splits")
    parser.add_argument("--out", default="runs", help="folder of all runs")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of the run")
    arguments = parser.parse_args()

    setformer.register_augmentation("darken", darken)
    config = setformer.load_config(
        run={"name": "own-model", "out": arguments.out, "log_every": 5},
        data={"root": arguments.data, "image_size": 16, "augment": {"crop": "none", "flip": False, "own": ["darken"]}},
        batch={"global_size": 64},
        schedule={"steps": arguments.steps},
        optim={"lr": 3e-3},
    )
    setformer.train(config, model=Patches)  # called with the number of outputs

    # A checkpoint holds weights and no code, so the code is given again.
    trained = setformer.load(config.folder, model=Patches)
    print(setformer.evaluate(trained).figures)


if __name__ == "__main__":
    main()
