"""The data alone, with a plain PyTorch loop: no DeepSpeed, no run folder.

python examples/own_loop.py --data runs/demo-data

The samples of step k, and every pixel of them, follow from the config and k. A loop that stopped resumes by asking for
`micro_batches(first_step=k)`.
"""

import argparse
import itertools

import timm
import torch
import torch.nn.functional as F

import setformer
import setformer_dist.models  # noqa: F401 (registers setformer_nano and others with timm)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", default="runs/demo-data", help="folder of packed splits")
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()

    config = setformer.load_config("demo", "batch.micro=64", data={"root": arguments.data})
    data = setformer.open_data(config)
    prepare = setformer.prepare(config, data)

    torch.manual_seed(0)
    model = timm.create_model("setformer_nano", num_classes=len(data.train.classes), stem_strides=[1, 2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    stream = setformer.train_stream(config, data)
    for batch in itertools.islice(stream.micro_batches(first_step=0), arguments.steps):
        images, targets = prepare(batch, train=True)  # (m, 3, H, W) and (m, classes), float32
        loss = F.cross_entropy(model(images), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if batch.step % 10 == 0:
            print(f"step {batch.step} loss {loss.item():.4f} samples {batch.sample_ids[:4].tolist()} ...")
    stream.close()

    model.eval()
    right, validation = 0.0, setformer.eval_stream(config, data)
    for batch in validation.micro_batches():
        images, _ = prepare(batch, train=False)
        with torch.no_grad():
            hits = model(images).argmax(dim=1) == batch.labels
        right += float((hits * batch.weights).sum())  # weight 0 is filling
    validation.close()
    print(f"top-1 {right / validation.num_samples:.1%}")


if __name__ == "__main__":
    main()
