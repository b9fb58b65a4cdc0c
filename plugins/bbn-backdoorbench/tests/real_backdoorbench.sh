#!/usr/bin/env bash
# Runs the bridge against a real checkout of BackdoorBench, and prints what happened to each of its methods.
#
#     real_backdoorbench.sh CHECKOUT [FOLDER]
#
# FOLDER (default: ./real-backdoorbench) gets an environment for BackdoorBench, a small data set in GTSRB's layout made
# from scikit-learn's digits, and all results; the checkout is only read. `bbn` and `python` are those on the PATH, with
# the bridge installed. It is not run in CI: it downloads torch, takes half an hour on two busy cores, and CC BY-NC
# code stays out of this repository.
set -euo pipefail

if [[ $# -lt 1 || ! -f "$1/defense/ft.py" ]]; then
    echo "usage: $0 CHECKOUT [FOLDER], where CHECKOUT is a checkout of BackdoorBench" >&2
    exit 2
fi
checkout=$(realpath "$1")
folder=$(realpath -m "${2:-real-backdoorbench}")
here=$(dirname "$(realpath "$0")")
if [[ "$folder" == *record* ]]; then
    echo "BackdoorBench cannot work below '$folder': choose a folder without 'record' in its path" >&2
    exit 2
fi
if ! bbn backdoorbench --help > /dev/null; then
    echo "install this plugin beside bbn first" >&2
    exit 2
fi
mkdir -p "$folder"

# pytorch_wavelets imports pkg_resources, which setuptools 81 removed, and pywt, which it does not ask for
packages=('setuptools<81' torch torchvision numpy scipy pandas kornia pytorch_wavelets PyWavelets scikit-learn scikit-image
    matplotlib tqdm pyyaml pillow opencv-python-headless)
if [[ ! -e "$folder/venv/installed" ]]; then
    if command -v uv > /dev/null; then
        uv venv --quiet --clear "$folder/venv"
        uv pip install --quiet --python "$folder/venv/bin/python" "${packages[@]}"
    else
        python -m venv --clear "$folder/venv"
        "$folder/venv/bin/python" -m pip install --quiet "${packages[@]}"
    fi
    touch "$folder/venv/installed"
fi

export BBN_BACKDOORBENCH_HOME="$folder/home"
export BBN_BACKDOORBENCH_PYTHON="$folder/venv/bin/python"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python "$here/real_backdoorbench.py" prepare "$checkout" "$folder"
cd "$folder/home"

attack() {
    # name, then further flags
    if [[ -e "record/$1/attack_result.pt" ]]; then return; fi
    PYTHONPATH="$(bbn backdoorbench shim):." TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 MPLBACKEND=Agg PYTHONDONTWRITEBYTECODE=1 \
        "$BBN_BACKDOORBENCH_PYTHON" "attack/$1.py" --yaml_path config/attack/prototype/gtsrb.yaml \
        --bd_yaml_path "config/attack/$1/default.yaml" --save_folder_name "$1" --dataset gtsrb \
        --model preactresnet18 --device cpu --num_workers 0 --batch_size 32 --pratio 0.1 "${@:2}" \
        > "$folder/attack_$1.log" 2>&1
}

for name in badnet wanet; do
    echo
    echo "== attack/$name.py, and bbn backdoorbench import"
    epochs=4
    if [[ $name == wanet ]]; then epochs=1; fi
    if attack "$name" --epochs "$epochs"; then
        bbn backdoorbench import "record/$name" --root data/gtsrb --results "$folder/results" || echo "FAILED: import"
    else
        echo "FAILED: $(tail -1 "$folder/attack_$name.log")"
    fi
done

echo
echo "== BackdoorBench's defenses in our matrix, on its record of badnet"
bbn run "$folder/methods.yaml" > "$folder/run.log" 2>&1 || true # each cell is reported below
python -W ignore "$here/real_backdoorbench.py" report "$folder"

echo
echo "== our defenses from BackdoorBench's command line, with its own YAML files"
ours() {
    # name, then flags that make it short
    local log="$folder/ours_$1.log"
    if python -m "bbn_backdoorbench.$1" --result_file badnet --yaml_path "config/defense/$1/gtsrb.yaml" \
        --dataset gtsrb --model preactresnet18 --device cpu "${@:2}" > "$log" 2>&1; then
        echo "$1: $(tail -1 "$log")"
    else
        echo "$1: FAILED: $(tail -2 "$log")"
    fi
}
ours nad --epochs 1 --te_epochs 1
ours abl --tuning_epochs 1 --finetuning_epochs 1 --unlearning_epochs 1 --isolation_ratio 0.05
ours ac --epochs 1
