# syntax=docker/dockerfile:1
# A machine with NVIDIA GPUs (driver 580 or newer). No account, key or model is inside: a model comes
# from a folder that is mounted, a key from the environment of `docker run` (-e WANDB_API_KEY).
#
#   docker build -t mediphi .
#   mkdir -p runs .cache
#   docker run --rm --gpus all --shm-size 16g --user "$(id -u):$(id -g)" \
#     -v "$PWD/runs:/workspace/runs" -v "$PWD/.cache:/workspace/.cache" \
#     mediphi stage=pit corpus=medcode hardware=gpu
#
# The hub is off; to ask it: -e HF_HUB_OFFLINE=0.
# For Slurm, as hardware.slurm.container=mediphi.sif:
#   docker save mediphi -o mediphi.tar && apptainer build mediphi.sif docker-archive:mediphi.tar
#
# With nvcc: DeepSpeed's offload and flash-attn are compiled.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

# Both are of the CUDA above.
ARG TORCH=2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cu130
ARG EXTRAS=deepspeed,lora
# A release such as 2.8.3 compiles flash-attn, which takes an hour or more; empty: PyTorch's own kernel.
ARG FLASH_ATTN=

ENV PATH=/opt/venv/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1

# Without the verbs NCCL takes TCP between machines, also where there is InfiniBand.
# Any user may write into /workspace, which is everybody's home.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        build-essential ibverbs-providers libibverbs1 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv \
    && useradd --no-create-home --uid 10001 mediphi \
    && install --directory --mode=1777 /workspace /workspace/runs /workspace/.cache

# Layers that change rarely stand first.
# hadolint ignore=DL3013
RUN pip install --index-url "${TORCH_INDEX}" "torch==${TORCH}" \
    && pip install setuptools packaging wheel ninja \
    && if [ -n "${FLASH_ATTN}" ]; then \
        MAX_JOBS=8 pip install --no-build-isolation "flash-attn==${FLASH_ATTN}"; \
    fi

WORKDIR /opt/mediphi
COPY . .
RUN pip install --editable ".[${EXTRAS}]" "torch==${TORCH}"

# LOGNAME: a number given by --user has no name in here.
ENV HF_HUB_OFFLINE=1 \
    HOME=/workspace \
    LOGNAME=mediphi

USER 10001
WORKDIR /workspace
ENTRYPOINT ["python", "/opt/mediphi/train.py"]
