#!/usr/bin/env bash
# Every figure about GPUs, the most important first; each is written as soon as it is there.
#
#   benchmarks/gpu.sh DATA OUT [STEPS]
#
# DATA holds cifar10/ and weights/ as benchmarks/cifar.py says, where it has them converted networks start/CASE that fine-tuning
# starts from (else it converts), and for the ImageNet figures lite0.safetensors and imagenet.npz as benchmarks/imagenet.py says.
# OUT gets JSON and logs. STEPS is a regular expression of the steps to run: unpack, tune-CASE, convert-NETWORK, latency-NETWORK
# (these by default, nine minutes in all), step and recipes. So they can be spread over several calls. From the environment:
# MINUTES (2) of one fine-tuning run of ResNet-56, SETTINGS of fine-tuning (name=value ...), RECIPES and EPOCHS (25) of recipes,
# EXTRA options of finetune_cifar.py (to try the script: EXTRA="--limit 2000"), CIFAR, the file that the images are unpacked to.
set -u
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD" PYTHONUNBUFFERED=1
data=$1 out=$2 steps=${3:-unpack|tune|convert|latency} minutes=${MINUTES:-2} settings=${SETTINGS:-batch_size=512}
cifar=${CIFAR:-$out/cifar10.npz}
mkdir -p "$out"

step() { # NAME SECONDS COMMAND...: runs it, if it is wanted, at most so long, and says how it went
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    [[ $name =~ $steps ]] || return
    timeout "$limit" "$@" > "$out/$name.log" 2>&1
    echo "$name: exit $?, $((SECONDS - start)) s, at $SECONDS s; $(tail -n 1 "$out/$name.log" | cut -c 1-700)"
}

start() { # CASE: --start FOLDER, where there is one
    [ ! -e "$data/start/$1" ] || echo "--start $data/start/$1"
}

tune() { # CASE MINUTES
    # shellcheck disable=SC2046,SC2086
    step "tune-$1" 240 python3 benchmarks/finetune_cifar.py "$1" --source-dir "$data/weights" --data "npz:$cifar" $(start "$1") \
        --minutes "$2" --set eval_epochs=20 $settings --out "$out/finetune_cifar.json" --quiet ${EXTRA:-}
}

# shellcheck disable=SC2046,SC2086
SHAREFOLD_DATA=$data step unpack 60 python3 benchmarks/cifar.py "$cifar"
step recipes 150 python3 benchmarks/finetune_recipes.py resnet20 --source "$data/weights/resnet20-12fca82f.th" $(start resnet20) \
    --data "npz:$cifar" --epochs "${EPOCHS:-25}" --set $settings --out "$out/finetune_recipes.json" ${RECIPES:+--recipes $RECIPES}
step step-resnet56 60 python3 benchmarks/finetune_step.py resnet56-319k --source "$data/weights/resnet56-4bfd9763.th" \
    $(start resnet56-319k) --batch 256 512 1024 --out "$out/finetune_step.json"
tune resnet56-319k "$minutes"
tune resnet56-202k "$minutes"
tune resnet20 "$(python3 -c "print($minutes / 2)")"
r56=(resnet56 --weights "$data/weights/resnet56-4bfd9763.th" --data "$cifar" --out "$out/gpu.json")
step convert-resnet56 90 python3 benchmarks/gpu.py convert "${r56[@]}" --save "$out/resnet56"
step latency-resnet56 60 python3 benchmarks/gpu.py latency "${r56[@]}" --network "$out/resnet56"
if [ -e "$data/lite0.safetensors" ]; then
    lite0=(lite0 --weights "$data/lite0.safetensors" --data "$data/imagenet.npz" --budget "80%" --out "$out/gpu.json")
    step convert-lite0 150 python3 benchmarks/gpu.py convert "${lite0[@]}" --times 1 --save "$out/lite0"
    step latency-lite0 60 python3 benchmarks/gpu.py latency "${lite0[@]}" --network "$out/lite0" --count 100
fi
