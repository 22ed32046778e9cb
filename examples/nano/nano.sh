#!/usr/bin/env bash
# Trains tiny models in about so many minutes on two cores, in ./nano; run again, it goes on where it stopped.
#
#     bash examples/nano/nano.sh 360
set -euo pipefail
minutes=${1:?must be the minutes to train for, such as 360}
recipes=$(cd "$(dirname "$0")" && pwd)
mkdir -p nano/data nano/cache && cd nano
export OMP_NUM_THREADS=1 # two lanes, a core each
options=(--mixed-precision "$(grep -q avx512_bf16 /proc/cpuinfo && echo bf16 || echo no)")
long=()
((minutes < 240)) || long=(--compile) # which takes minutes

per_hour() { # what an hour of the whole has so many of
    echo $((minutes * $1 / 60 + 1))
}
recipe() { # name of the output, recipe, steps an hour of the whole, options
    python "$recipes/$2.py" --output "runs/$1" --steps "$(per_hour "$3")" "${options[@]}" "${@:4}"
}
dataset() { # name, width, height, clips an hour, options
    [ -d "data/$1" ] || python "$recipes/make_dataset.py" "data/$1" --size "$2" "$3" --clips "$(per_hour "$4")" "${@:5}"
}
both() { # runs two functions at the same time, each to its end, and fails if one does
    local failed=0
    "$1" & first=$!
    "$2" & second=$!
    wait $first || failed=1
    wait $second || failed=1
    return $failed
}

dataset 128 128 128 400
dataset 96x160 96 160 100
dataset 256 256 256 50
dataset held_out 128 128 2 --held-out
datasets=(--data data/128 data/96x160 data/256 --held-out data/held_out)

# 1. What clips and prompts say
video() { recipe turbo_vae train_turbo_vae 4000 "${datasets[@]}" "${long[@]}"; }
text() { recipe text_encoder train_text_encoder 1200; }
both video text

# 2. Latents of clips: width, height, frames, and how many parts of equal numbers of clips an hour of the whole has
shapes=(
    "128 128 49 8" "128 128 25 2" "128 128 97 2" "128 128 149 1" "256 256 25 2"
    "96 160 49 3" "160 96 49 3" "128 160 49 3" "160 128 49 3" "96 160 97 1" "160 128 97 1"
)
clips=$((minutes < 60 ? minutes + 1 : 60))
lane() { # draws and encodes each second part
    for number in "${!shapes[@]}"; do
        read -r width height frames parts <<<"${shapes[number]}"
        # The upscaler needs the same clips in two sizes; all other shapes have clips of their own.
        first=$((width == height && frames == 25 ? 0 : (number + 1) * 100000))
        for ((part = $1; part < $(per_hour "$parts"); part += 2)); do
            folder=cache/${width}x${height}x$frames/$part
            [ -d "$folder" ] || python "$recipes/cache_latents.py" --output "$folder" --size "$width" "$height" \
                --frames "$frames" --clips $clips --first $((first + part * clips)) --turbo-vae runs/turbo_vae \
                "${options[@]}" >/dev/null
        done
    done
}
even() { lane 0; }
odd() { lane 1; }
both even odd

# 3. Transformers, the decoder of the base, and sound
text_and_vae=(--text runs/text_encoder --turbo-vae runs/turbo_vae)
small=(cache/{1[26]*,96}x*x*[0-9][0-9]/*)
generation() {
    recipe base train_transformer 600 --decay 0.85 --data "${small[@]}" "${text_and_vae[@]}" "${long[@]}"
    recipe distilled train_distilled 20 --data "${small[@]}" --base runs/base "${text_and_vae[@]}" --save-every 20
}
decoding() {
    recipe audio_vae train_audio_vae 3000 "${long[@]}"
    recipe video_vae train_video_vae 2500 "${datasets[@]}" --turbo-vae runs/turbo_vae
    recipe upscale train_upscale 500 --low cache/128x128x25/* --high cache/256x256x25/* "${text_and_vae[@]}" \
        "${long[@]}"
}
both generation decoding
python "$recipes/assemble.py" runs models
