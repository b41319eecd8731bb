"""A callback: it prints every evaluation, and remembers the best one, also when the run is interrupted and resumes.

python examples/own_callback.py --data runs/demo-data
"""

import argparse
from collections.abc import Mapping
from typing import Any

import setformer


class Best(setformer.Callback):
    """Remembers the best accuracy."""

    name = "best"

    def __init__(self) -> None:
        self.best = 0.0

    def on_evaluation_end(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Compare the accuracy with the best so far."""
        self.best = max(self.best, metrics["top1"])
        print(f"step {step}: {metrics['top1']:.2%}, best {self.best:.2%}")

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"best": self.best}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what a checkpoint kept."""
        self.best = state["best"]


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
        run={"name": "own-callback", "out": arguments.out},
        data={"root": arguments.data},
        schedule={"steps": arguments.steps},
        eval={"every_steps": max(1, arguments.steps // 2)},
    )
    setformer.train(config, callbacks=[Best()])


if __name__ == "__main__":
    main()
