# Serves `paretron export --to triton`, backends vllm and onnx. From the repository's root:
#   docker build -f containers/triton-vllm.Dockerfile -t paretron/triton-vllm containers
#   containers/run.sh triton-vllm REPOSITORY
ARG IMAGE=nvcr.io/nvidia/tritonserver:26.08-vllm-python-py3
FROM ${IMAGE}

ARG VLLM_VERSION=0.27.1
ARG ONNXRUNTIME_VERSION=1.32.0
ARG ONNXRUNTIME_GENAI_VERSION=0.18.0
# The checks come last: installing must not have changed what the image brings.
RUN python3 -m pip install --no-cache-dir "onnxruntime==${ONNXRUNTIME_VERSION}" \
      "onnxruntime-genai==${ONNXRUNTIME_GENAI_VERSION}" && \
    python3 -c "import onnxruntime_genai, tokenizers" && \
    python3 -c "import sys; from importlib.metadata import version; \
      found = version('vllm').split('+')[0]; \
      sys.exit(found != '${VLLM_VERSION}' and f'vllm {found}, not ${VLLM_VERSION}')"

# Caches go to /tmp, the only place that is written to. The weights are in the repository.
ENV HOME=/tmp USER=triton-server HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
USER 1000:1000
EXPOSE 8000 8001 8002
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s --retries=3 \
  CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://localhost:8000/v2/health/ready', timeout=4)"]
CMD ["tritonserver", "--model-repository=/models", "--model-control-mode=none"]
