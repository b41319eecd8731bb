"""Score a trained checkpoint, and classify images with it.

python examples/use_checkpoint.py runs/demo runs/demo-data/images/val/3/*.png
"""

import argparse
from pathlib import Path

import torch

import setformer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", help="a run's folder, or one step's checkpoint")
    parser.add_argument("images", nargs="*", type=Path, help="image files")
    parser.add_argument("--data", help="folder of packed splits; by default the run's own")
    arguments = parser.parse_args()

    trained = setformer.load(arguments.run)
    print(f"{trained.checkpoint.path}, {trained.weights} weights, {len(trained.classes)} classes")
    result = setformer.evaluate(trained, data=arguments.data)
    print(f"{result.figures} on {result.samples} samples")
    for found in setformer.predict(trained, arguments.images, top=2):
        likely = zip(found.classes, found.probabilities, strict=True)
        print(f"{found.image}: {', '.join(f'{name} {p:.1%}' for name, p in likely)}")

    # The model is an ordinary module.
    side = trained.config.data.image_size
    with torch.no_grad():
        print(trained.model(torch.zeros(1, 3, side, side)).shape)


if __name__ == "__main__":
    main()
