# The project on NVIDIA's PyTorch image. Not built or run yet: see docs/installation.md and docs/verification.md.
#
#   docker build -t megatron-zeda .
#   docker run --rm -it --gpus all --ipc=host --ulimit memlock=-1 --ulimit stack=67108864 -v /data:/data megatron-zeda
#   docker run --rm --gpus all --ipc=host -v "$PWD/runs:/opt/megatron-zeda/runs" megatron-zeda make test-gpu PYTHON=python
#
# CUDA 13.2, PyTorch 2.12.0a0 and Python 3.12, as its users report; the rest as NVIDIA compiled it for them.
FROM nvcr.io/nvidia/pytorch:26.05-py3

WORKDIR /opt/megatron-zeda

# torch, Transformer Engine, apex and their libraries stay as they are: pip may add packages, not replace these.
COPY docker/compiled_packages.py docker/compiled_packages.py
RUN python docker/compiled_packages.py > /opt/compiled-packages.txt \
    && cat /opt/compiled-packages.txt \
    && grep -q '^torch==' /opt/compiled-packages.txt \
    && grep -q '^transformer-engine' /opt/compiled-packages.txt

COPY . .
# The image's own PIP_CONSTRAINT pins every Python package in it, also those that may move, and the build tools.
# Afterwards nothing compiled may have moved.
RUN PIP_CONSTRAINT= python -m pip install --no-cache-dir --constraint /opt/compiled-packages.txt \
        'megatron-core==0.19.2' 'pytest>=8' --editable . \
    && python docker/compiled_packages.py | diff /opt/compiled-packages.txt - \
    && zeda --help > /dev/null

# One queue for all work keeps Megatron-Core's overlap of communication and computation in order on Hopper.
ENV CUDA_DEVICE_MAX_CONNECTIONS=1
