#!/usr/bin/env bash
# Every figure about GPUs in one run of nine minutes, the most important first; each is written as soon as it is there.
#
#   benchmarks/gpu.sh DATA OUT [MINUTES]
#
# DATA holds cifar10/ and weights/ as benchmarks/cifar.py says, and, where the ImageNet figures are wanted too,
# lite0.safetensors and imagenet.npz as benchmarks/imagenet.py says. OUT gets JSON and logs. MINUTES (2) is the time of one
# fine-tuning run of ResNet-56. EXTRA holds more options of finetune_cifar.py (to try the script: EXTRA="--limit 2000").
set -u
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD" PYTHONUNBUFFERED=1
data=$1 out=$2 minutes=${3:-2}
mkdir -p "$out"
cifar=$(mktemp -d)/cifar10.npz

step() { # NAME SECONDS COMMAND...: runs it, at most so long, and says how it went
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    timeout "$limit" "$@" > "$out/$name.log" 2>&1
    echo "$name: exit $?, $((SECONDS - start)) s, at $SECONDS s; $(tail -n 1 "$out/$name.log" | cut -c 1-300)"
}

tune() { # CASE MINUTES SEEDS
    step "tune-$1" 200 python3 benchmarks/finetune_cifar.py "$1" --source-dir "$data/weights" --data "npz:$cifar" \
        --minutes "$2" --seeds "$3" --set batch_size=256 eval_epochs=20 --out "$out/finetune_cifar.json" ${EXTRA:-}
}

SHAREFOLD_DATA=$data step unpack 60 python3 benchmarks/cifar.py "$cifar"
tune resnet56-319k "$minutes" 1
tune resnet56-202k "$minutes" 1
tune resnet20 "$(python3 -c "print($minutes / 2)")" 1
r56=(resnet56 --weights "$data/weights/resnet56-4bfd9763.th" --data "$cifar")
step convert-resnet56 90 python3 benchmarks/gpu.py convert "${r56[@]}" --out "$out/gpu.json"
step latency-resnet56 60 python3 benchmarks/gpu.py latency "${r56[@]}" --times 1 --out "$out/gpu.json"
if [ -e "$data/lite0.safetensors" ]; then
    lite0=(lite0 --weights "$data/lite0.safetensors" --data "$data/imagenet.npz" --budget "80%")
    step convert-lite0 150 python3 benchmarks/gpu.py convert "${lite0[@]}" --times 1 --out "$out/gpu.json"
    step latency-lite0 60 python3 benchmarks/gpu.py latency "${lite0[@]}" --times 1 --count 100 --out "$out/gpu.json"
fi
