#!/usr/bin/env bash
#SBATCH --job-name=kvcompress
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=04:00:00
#
# The pipeline on several nodes that share this folder. Submit with `sbatch recipes/slurm.sh` from the project's root, after
# `make setup`; DRY_RUN=1 bash recipes/slurm.sh prints what would be run.
#
# The two stages that measure heads run on all GPUs of all nodes, each only if its result is not there yet, not even at the
# shared remote (`dvc remote add --default shared PLACE`); the others on the first node's.
set -euo pipefail

run() {
    if [ -n "${DRY_RUN:-}" ]; then
        echo "$*"
    else
        "$@"
    fi
}

nodes=${SLURM_JOB_NUM_NODES:-1} gpus=${SLURM_GPUS_ON_NODE:-1} head=${SLURMD_NODENAME:-localhost}
export PATH="$PWD/.venv/bin:$PATH"

run dvc pull --run-cache --allow-missing
run dvc repro --pull prepare
for stage in collect_attention measure_sensitivity; do
    if [ -n "${DRY_RUN:-}" ] || ! dvc status --quiet "$stage"; then
        run srun --kill-on-bad-exit=1 torchrun --nnodes "$nodes" --nproc-per-node "$gpus" --rdzv-backend c10d \
            --rdzv-endpoint "$head:29400" --rdzv-id "${SLURM_JOB_ID:-0}" -m "stages.$stage"
        run dvc commit --force "$stage" # into the ledger: what was run is the stage's own command
    fi
done
run dvc exp run -S machine.processes=gpus --pull
run dvc push --run-cache
