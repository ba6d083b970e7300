#!/usr/bin/env bash
# Runs an image built from a Dockerfile beside this file, with NGC's usual flags:
#   run.sh toolkit|cpu FOLDER [ARGUMENTS OF paretron]    FOLDER is /data in there, and writable
#   run.sh triton-vllm|triton-trtllm REPOSITORY          ports 8000 (HTTP), 8001 (gRPC), 8002
# Nothing else can be written to. PARETRON_GPUS=none runs without a GPU, for the onnx backend.
set -euo pipefail

usage() {
  sed -n '2,5s/^# //p' "${BASH_SOURCE[0]}" >&2
  exit 2
}

[ $# -ge 2 ] || usage
name="$1" folder="$(realpath "$2")"
shift 2
[ -d "$folder" ] || { echo "$folder: no such folder" >&2; exit 2; }

flags=(--rm --read-only --tmpfs "/tmp:exec,mode=1777" --cap-drop ALL
  --security-opt no-new-privileges)
gpus=(--gpus "${PARETRON_GPUS:-all}" --ipc host --shm-size=2g --ulimit memlock=-1)
[ "${PARETRON_GPUS:-all}" = none ] && gpus=(--shm-size=2g)
# What is written belongs to whoever asked for it.
own=(--user "$(id -u):$(id -g)" --volume "$folder:/data")
serve=(--volume "$folder:/models:ro" --publish 127.0.0.1:8000-8002:8000-8002)

case "$name" in
  cpu) exec docker run "${flags[@]}" "${own[@]}" paretron/cpu "$@" ;;
  toolkit) exec docker run "${flags[@]}" "${gpus[@]}" "${own[@]}" paretron/toolkit paretron "$@" ;;
  triton-vllm | triton-trtllm)
    exec docker run "${flags[@]}" "${gpus[@]}" "${serve[@]}" "paretron/$name" "$@"
    ;;
  *) usage ;;
esac
