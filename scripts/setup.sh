#!/usr/bin/env bash
# Installs what the project needs, and only what is missing: Debian/Ubuntu packages (as root or
# through sudo) and a Python environment in .venv for data preparation, plots and lint.
#
#   scripts/setup.sh         what building, training and data preparation need
#   scripts/setup.sh --dev   also what tests, lint and fuzzing need
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(gcc g++ libc6-dev cmake ninja-build pkg-config libhdf5-dev libopenblas-openmp-dev
          libjansson-dev libxxhash-dev python3 python3-venv xz-utils)
if [ "${1:-}" = "--dev" ]; then
    packages+=(git check clang libclang-rt-dev cppcheck shellcheck util-linux iproute2)
fi

as_root=()
[ "$(id -u)" -eq 0 ] || as_root=(sudo)
is_installed() { dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null | grep -qx installed; }
install_packages() {
    if [ "${#as_root[@]}" -gt 0 ] && ! command -v sudo >/dev/null; then
        echo "setup: not root and no sudo; please install: $*" >&2
        return 1
    fi
    "${as_root[@]}" apt-get update -qq &&
        "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
            apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

missing=()
for package in "${packages[@]}"; do
    is_installed "$package" || missing+=("$package")
done
if [ "${#missing[@]}" -gt 0 ]; then
    echo "setup: installing ${missing[*]}"
    install_packages "${missing[@]}"
fi

# A Slurm for tests/test_slurm.sh, which is skipped without one.
if [ "${1:-}" = "--dev" ] && ! command -v sbatch >/dev/null; then
    echo "setup: installing slurm-wlm and munge"
    install_packages slurm-wlm munge ||
        echo "setup: no Slurm here; what tests it will be skipped" >&2
fi

# The stamp holds the requirements it was made from: a change of the file rebuilds the environment.
if ! cmp -s scripts/requirements.txt .venv/requirements.stamp; then
    echo "setup: making the Python environment .venv"
    rm -rf .venv
    python3 -m venv .venv
    .venv/bin/python -m pip install -q --disable-pip-version-check -r scripts/requirements.txt
    cp scripts/requirements.txt .venv/requirements.stamp
fi

# With CUDA on the machine: the headers of cuDNN's frontend (attention). Its Python dependencies are
# large and not needed.
if [ -x "$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)" ] &&
    ! .venv/bin/python -m pip show -q nvidia-cudnn-frontend 2>/dev/null; then
    echo "setup: adding cuDNN's frontend headers"
    .venv/bin/python -m pip install -q --disable-pip-version-check --no-deps \
        nvidia-cudnn-frontend==1.32.0
fi
