#!/usr/bin/env bash
# The whole way of a network through cctool, on the digits that the package ships: each step is a file that
# the next one reads. Usage: docs/demo.sh [CCTOOL [FOLDER]]
set -euo pipefail
cctool=${1:-cctool}
folder=${2:-demo}
rm -rf "$folder"
mkdir -p "$folder"

# The digits are few: small batches make enough steps of an epoch.
tune=(--batch-size 32 --lr 0.003)
fit=(--data digits "${tune[@]}")

step() {
    printf '\n$ cctool %s\n' "$*"
    "$cctool" "$@"
}

step train --arch resnet20 "${fit[@]}" --epochs 10 -o "$folder/teacher.pt"
step distill --arch mobilenet_student --teacher "$folder/teacher.pt" "${fit[@]}" --epochs 20 -o "$folder/student.pt"
step prune "$folder/student.pt" --method slimming --rate 0.5 --finetune-epochs 10 "${tune[@]}" -o "$folder/pruned.pt"
step quantize "$folder/pruned.pt" --method uint8 -o "$folder/small.pt"
step transform "$folder/pruned.pt" --layers all --keep 0.8 -o "$folder/coefficients.pt"
step transform "$folder/pruned.pt" --target features -o "$folder/coded.pt"
step evaluate "$folder/coded.pt" --bitstream "$folder/maps"
step decode "$folder/maps" -o "$folder/decoded"
step analyze "$folder/small.pt" --macs --sparsity
step export "$folder/small.pt" -o "$folder/small.onnx"
step analyze "$folder/small.pt" --history
step compare "$folder/teacher.pt" "$folder/student.pt" "$folder/pruned.pt" "$folder/small.pt" \
    "$folder/coefficients.pt" "$folder/coded.pt"
