"""Train from Python: a run that stops, is looked at, and continues.

python examples/train.py                          # the digits that `make demo` has packed
python examples/train.py --data DATA --steps 40
"""

import argparse

import setformer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", default="runs/demo-data", help="folder of packed splits")
    parser.add_argument("--out", default="runs", help="folder of all runs")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of the run")
    arguments = parser.parse_args()

    config = setformer.load_config(
        "demo",  # the run config; then what differs from it
        "~schedule.epochs",
        "~schedule.warmup_epochs",
        run={"name": "from-python", "out": arguments.out, "log_every": 5},
        data={"root": arguments.data},
        schedule={"steps": arguments.steps, "warmup_steps": arguments.steps // 10},
        eval={"every_epochs": 0},
    )
    with setformer.Training(config) as run:
        run.train(steps=arguments.steps // 2)
        print(f"half way, at step {run.step}: {run.evaluate()}")
        run.save()  # a kill from here on loses nothing
        outcome = run.train()
    print(f"at the end, at step {outcome.state.step}: {outcome.state.evaluation}")
    print(f"the run is in {config.folder}; `setformer runs show {config.folder}` says where its time went")


if __name__ == "__main__":
    main()
