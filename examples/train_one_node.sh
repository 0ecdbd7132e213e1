#!/usr/bin/env bash
# All GPUs of this machine: examples/train_one_node.sh DATA_PREFIX TOKENIZER OUTPUT [any flag of linear-moe pretrain]
set -euo pipefail
data=$1 tokenizer=$2 output=$3
shift 3
export CUDA_DEVICE_MAX_CONNECTIONS=1  # Megatron's order of communication and computation under tensor parallelism
exec torchrun --standalone --nproc-per-node "${GPUS:-$(nvidia-smi --list-gpus | wc -l)}" -m linear_moe pretrain \
    --config "${CONFIG:-llama3/340m_mom}" \
    --data-path "$data" --split 990,9,1 --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$tokenizer" \
    --save "$output/checkpoints" --load "$output/checkpoints" --tensorboard-dir "$output/tensorboard" "$@"
