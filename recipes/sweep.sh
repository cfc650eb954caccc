#!/usr/bin/env bash
# Work off the queued experiments with one worker on each GPU (GPUS=2: on the first two; on CPUs, just as many workers).
#
#     dvc exp run --queue -S 'sensitivity.sinks=0,4,8'
#     bash recipes/sweep.sh
#     dvc queue status
#
# DVC's queue is the scheduler: a worker takes the next experiment, runs it in a copy of the project of its own, with that
# copy's code, and ends when nothing is left. A worker keeps the environment that it was started with, so each is started
# with one GPU in sight: `dvc queue start --jobs N` adds those of N workers that are not there yet.
set -euo pipefail

workers() { # that have reported, busy or not
    dvc queue status | sed -n 's/^Worker status: \([0-9]*\) active, \([0-9]*\) idle$/\1 + \2/p'
}

gpus=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
for ((worker = 1; worker <= gpus; worker++)); do
    CUDA_VISIBLE_DEVICES=$((worker - 1)) dvc queue start --jobs "$worker"
    for ((tries = 0; tries < 30 && $(workers) < worker; tries++)); do
        sleep 1 # else the next round would start this one again, on another GPU
    done
done
