# Paretron on a machine without a GPU. From the repository's root:
#   docker build -f containers/cpu.Dockerfile -t paretron/cpu .
#   containers/run.sh cpu FOLDER run recipe.yaml
# PyPI's torch is built for CUDA; `--build-arg PIP_EXTRA_INDEX_URL=...` names an index with a smaller
# one, where there is one.
ARG IMAGE=python:3.11-slim-bookworm
FROM ${IMAGE}

ARG PIP_EXTRA_INDEX_URL
WORKDIR /opt/paretron
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY toolkit toolkit
COPY exporters exporters
COPY profiling profiling
COPY recipes recipes
RUN python -m pip install --no-cache-dir -c constraints.txt setuptools && \
    python -m pip install --no-cache-dir -c constraints.txt --no-build-isolation \
      '.[onnx,gguf,triton,eval,data]'

# Nothing is written outside of /data, where the recipe's folder is mounted, and /tmp.
ENV HOME=/tmp USER=paretron HF_HOME=/data/.cache/huggingface HF_HUB_DISABLE_TELEMETRY=1
WORKDIR /data
USER 1000:1000
HEALTHCHECK NONE
ENTRYPOINT ["paretron"]
CMD ["doctor"]
