# Paretron for training and measuring on GPUs, on NVIDIA's PyTorch. From the repository's root:
#   docker build -f containers/toolkit.Dockerfile -t paretron/toolkit .
#   containers/run.sh toolkit FOLDER run recipe.yaml
ARG IMAGE=nvcr.io/nvidia/pytorch:26.07-py3
FROM ${IMAGE}

WORKDIR /opt/paretron
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY toolkit toolkit
COPY exporters exporters
COPY profiling profiling
COPY recipes recipes
# What the image brings stays as NVIDIA built it; the exact versions are for the rest. The last line
# fails the build where torch was exchanged for one without CUDA.
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN python -m pip list --format=freeze | sed 's/==.*//; s/_/-/g; s/.*/^&==/' >/tmp/brought && \
    grep -v -i -f /tmp/brought constraints.txt >/tmp/constraints && \
    python -m pip install --no-cache-dir -c /tmp/constraints 'setuptools>=80' && \
    python -m pip install --no-cache-dir -c /tmp/constraints --no-build-isolation \
      '.[quantize,triton,eval,data,lora,tensorboard]' && \
    rm /tmp/brought /tmp/constraints && \
    python -c 'import sys, torch; sys.exit(not torch.version.cuda)'

# Nothing is written outside of /data, where the recipe's folder is mounted, and /tmp.
ENV HOME=/tmp USER=paretron HF_HOME=/data/.cache/huggingface HF_HUB_DISABLE_TELEMETRY=1
WORKDIR /data
USER 1000:1000
HEALTHCHECK NONE
CMD ["paretron", "doctor"]
