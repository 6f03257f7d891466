#!/usr/bin/env bash
# Every figure about a mini checkpoint that depends on its weights, after they changed:
#
#   scripts/measure_mini.sh vggt-mini
#   scripts/measure_mini.sh pi3-mini runs/figures
#
# Trains the predictor of Co-Me first, as its file belongs to the weights. Scores go to the folder given, what is kept to
# benchmarks/. Cut off, the same command goes on with what is missing. Two hours on one CPU core; with two cores run one
# model on each, with OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive.
set -euo pipefail
model=$1
out=${2:-runs/figures}/$model
mkdir -p "$out"

score() {  # name, settings of geoaccel eval
    local name=$1
    shift
    [[ -s $out/$name.json ]] && return
    echo "$name" >&2
    geoaccel eval data=synthetic timing.repeats=0 "$@" out="$out/$name" | tail -n 1 > "$out/$name.tmp"
    mv "$out/$name.tmp" "$out/$name.json"
}

if [[ ! -e $out/predictor ]]; then
    python scripts/train_confidence.py model="$model"
    touch "$out/predictor"
fi

score float model="$model"
score frame-only model="$model" control=frame-only
score 32-frames model="$model" data.frames=32 data.scenes=16
score 64-frames model="$model" data.frames=64 data.scenes=8
score fp8 model="$model" quantization=fp8
score w4a16 model="$model" quantization=w4a16
[[ -e $out/w4.safetensors ]] || geoaccel quantize calibrate --model "$model" --quantization w4a16 --out "$out/w4.safetensors"
score w4a16-calibrated model="$out/w4.safetensors"

python scripts/measure_merging.py model="$model" frames=64 scenes=8 out="$out/merging"
cp "$out/merging/$model-64frames/differences.json" "benchmarks/merging-$model-64frames.json"
python scripts/quantization_ablation.py "$model" --out "benchmarks/quantization-$model" --scenes 24 --sensitivity-scenes 4
geoaccel quantize sensitivity --model "$model" --quantization w4a16 --scenes 8 --out "benchmarks/sensitivity-$model.json"
