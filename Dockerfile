# A GPU host's image: CUDA's runtime, Python 3.12, this package with the versions of constraints.txt.
#
#   docker build -t setformer .
#   docker run --gpus all --ipc=host -v "$PWD":/work setformer train demo --ranks 8
#
# torch brings its own CUDA libraries, so the base image only has to match the driver. `devel` instead of `runtime`
# lets DeepSpeed compile operators; training here needs none of them. --ipc=host gives reader processes shared memory.
FROM nvidia/cuda:13.0.3-runtime-ubuntu24.04

ENV DEBIAN_FRONTEND=noninteractive \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# g++ compiles the attention kernel for CPUs when it is first used; Triton needs gcc and Python's headers for GPUs.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential python3.12 python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/*

RUN python3.12 -m venv /opt/setformer
ENV PATH=/opt/setformer/bin:$PATH

# First what changes seldom: a change of our own code does not install torch again.
WORKDIR /opt/source
COPY constraints.txt pyproject.toml README.md LICENSE NOTICE ./
# hadolint ignore=DL3013
RUN pip install --no-cache-dir --constraint constraints.txt torch torchvision deepspeed timm

COPY checkpoints checkpoints
COPY configs configs
COPY dataloaders dataloaders
COPY launch launch
COPY setformer setformer
COPY setformer_dist setformer_dist
RUN pip install --no-cache-dir --constraint constraints.txt . \
    && setformer --version

RUN useradd --create-home --uid 10001 trainer
USER 10001
WORKDIR /work
ENTRYPOINT ["setformer"]
CMD ["--help"]
