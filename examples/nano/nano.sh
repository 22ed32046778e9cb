#!/usr/bin/env bash
# Trains tiny models in about so many minutes on two cores, in ./nano; run again, it goes on where it stopped.
#
#     bash examples/nano/nano.sh 360
set -euo pipefail
minutes=$1
recipes=$(cd "$(dirname "$0")" && pwd)
mkdir -p nano && cd nano

# Compiling takes two minutes for each transformer.
compile=$([ "$minutes" -ge 60 ] && echo --compile || true)

recipe() { # name of the output, recipe, steps a minute, options
    python "$recipes/$2.py" --output "runs/$1" --steps $((minutes * $3)) "${@:4}"
}

for size in 128 256; do
    clips=$((size == 128 ? minutes * 20 + 4 : minutes * 4 + 4))
    [ -f data/$size/scenes.jsonl ] || python "$recipes/make_dataset.py" data/$size --clips $clips --size $size
done
text_and_vae=(--text runs/text_encoder --video-vae runs/video_vae)
recipe text_encoder train_text_encoder 4
recipe audio_vae train_audio_vae 25 --data data/128
recipe video_vae train_video_vae 8 --data data/128 data/256
recipe turbo_vae train_turbo_vae 8 --data data/128 data/256 --teacher runs/video_vae
for size in 128 256; do
    [ -f cache/$size/scenes.jsonl ] || python "$recipes/cache_latents.py" \
        --data data/$size --video-vae runs/video_vae --audio-vae runs/audio_vae --output cache/$size
done
recipe base train_transformer 30 --data cache/128 "${text_and_vae[@]}" $compile
# Few steps: with more of them colours drift.
recipe distilled train_distilled 1 --data cache/128 --base runs/base "${text_and_vae[@]}" $compile \
    --steps $((minutes / 6 + 1))
recipe upscale train_upscale 8 --low cache/128 --high cache/256 "${text_and_vae[@]}" $compile
python "$recipes/assemble.py" runs models
