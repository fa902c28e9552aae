#!/usr/bin/env bash
# Everything that takes a GPU, in one command without a network: builds what is missing, runs the test suite on
# the GPU, replays the lane vectors, sanitizes, profiles, measures, and writes docs/results/gpu.{json,md}.
# `bench/gpu.sh --dry-run` says what would be done and what is missing; `--help` the rest.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" bench/gpu.py "$@"
