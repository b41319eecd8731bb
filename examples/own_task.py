"""A task of one's own: cross entropy with a term that asks more of what is nearly right (PolyLoss, Leng et al. 2022).

python examples/own_task.py --data runs/demo-data

The command line trains it as well: `setformer train demo 'run.imports=["examples.own_task"]' task.name=poly
checkpoint.best_metric=top1`.
"""

import argparse
from collections.abc import Mapping
from typing import Any

import torch

import setformer
from setformer_dist.tasks.classification import Classification


class Poly(Classification):
    """Classification with another loss; scores and outputs are classification's.

    Args:
        args: `epsilon`, the weight of the further term.
        classes: names of the data's classes.
    """

    name = "poly"

    def __init__(self, args: Mapping[str, Any], classes: tuple[str, ...]) -> None:
        super().__init__({}, classes)
        self.epsilon = float(args.get("epsilon", 1.0))

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean over the micro batch: outputs (m, classes), targets (m, classes), rows summing to 1."""
        right = (outputs.float().softmax(dim=1) * targets).sum(dim=1)
        return super().loss(outputs, targets) + self.epsilon * (1 - right).mean()


setformer.register_task("poly", Poly)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", default="runs/demo-data", help="folder of packed splits")
    parser.add_argument("--out", default="runs", help="folder of all runs")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of the run")
    arguments = parser.parse_args()

    config = setformer.load_config(
        "demo",
        "~schedule.epochs",
        "~schedule.warmup_epochs",
        run={"name": "own-task", "out": arguments.out},
        task={"name": "poly", "args": {"epsilon": 2.0}},
        data={"root": arguments.data},
        schedule={"steps": arguments.steps},
        checkpoint={"best_metric": "top1"},
    )
    print(setformer.train(config).state.evaluation)


if __name__ == "__main__":
    main()
