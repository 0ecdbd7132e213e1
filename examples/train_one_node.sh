#!/usr/bin/env bash
# All GPUs of this machine: examples/train_one_node.sh DATA_PREFIX TOKENIZER OUTPUT [any flag of linear-moe pretrain]
# Called again with the same OUTPUT, it goes on from the last checkpoint there. Variables:
#   GPUS    processes, one a GPU (default: as many as nvidia-smi lists)
#   CONFIG  configuration (default: llama3/340m_mom)
set -euo pipefail
fail() { echo "$0: $*" >&2; exit 1; }
[ $# -ge 3 ] || fail "usage: [GPUS=N] [CONFIG=NAME] $0 DATA_PREFIX TOKENIZER OUTPUT [any flag of linear-moe pretrain]"
data=$1 tokenizer=$2 output=$3
shift 3
if [ -z "${GPUS:-}" ]; then
    GPUS=$(nvidia-smi --list-gpus 2>/dev/null | grep -c .) ||
        fail "nvidia-smi finds no GPU here; GPUS=N says how many processes to start (on a CPU: linear-moe pretrain)"
fi
export CUDA_DEVICE_MAX_CONNECTIONS=1  # Megatron's order of communication and computation under tensor parallelism
exec torchrun --standalone --nproc-per-node "$GPUS" -m linear_moe pretrain \
    --config "${CONFIG:-llama3/340m_mom}" \
    --data-path "$data" --split 990,9,1 --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$tokenizer" \
    --save "$output/checkpoints" --load "$output/checkpoints" --tensorboard-dir "$output/tensorboard" "$@"
