# Serves `paretron export --to triton --backend trtllm`. From the repository's root:
#   docker build -f containers/triton-trtllm.Dockerfile -t paretron/triton-trtllm containers
#   containers/run.sh triton-trtllm REPOSITORY
ARG IMAGE=nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3
FROM ${IMAGE}

ARG TENSORRT_LLM_VERSION=1.2.1
# Where the image keeps the model.py of its own TensorRT-LLM: of the same release, never from us.
ARG LLMAPI=/app/all_models/llmapi/tensorrt_llm/1
RUN python3 -c "import sys; from importlib.metadata import version; \
      found = version('tensorrt_llm'); \
      sys.exit(found != '${TENSORRT_LLM_VERSION}' \
        and f'tensorrt_llm {found}, not ${TENSORRT_LLM_VERSION}')" && \
    install -D --mode=0444 --target-directory=/opt/llmapi \
      "${LLMAPI}/model.py" "${LLMAPI}/helpers.py"
COPY --chmod=0555 serve-trtllm /usr/local/bin/serve-trtllm

# Caches go to /tmp, the only place that is written to. The weights are in the repository.
ENV HOME=/tmp USER=triton-server HF_HUB_OFFLINE=1 DO_NOT_TRACK=1
USER 1000:1000
EXPOSE 8000 8001 8002
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s --retries=3 \
  CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://localhost:8000/v2/health/ready', timeout=4)"]
CMD ["serve-trtllm"]
