#!/bin/sh
# What an image for gnnmd holds: run as root in an empty Debian 12, with the repository in /opt/gnnmd.
# torch brings its own CUDA; only the driver comes from the host (apptainer --nv, enroot).
set -eu
apt-get update
apt-get install -y --no-install-recommends python3-venv python3-dev g++
python3 -m venv /opt/venv
/opt/venv/bin/pip install --no-cache-dir "${TORCH:-torch==2.13.0}"
/opt/venv/bin/pip install --no-cache-dir "/opt/gnnmd${EXTRAS-[gpu]}"
/opt/venv/bin/gnnmd --version
