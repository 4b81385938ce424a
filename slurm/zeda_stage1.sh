#!/usr/bin/env bash
# Stage 1 on a Slurm cluster, one task per GPU:
#
#   sbatch [sbatch flags] slurm/zeda_stage1.sh [CONFIG.yaml] [section.key=value ...]
#
# Without a CONFIG.yaml it trains examples/qwen3_30b_a3b/stage1.yaml. Relative paths are relative to the directory that
# sbatch was called in. Account, partition, time and size are sbatch flags, which win over the header:
#
#   sbatch -A my_account -p gpu --nodes=2 slurm/zeda_stage1.sh my.yaml optimizer.lr=1e-5
#
# The same command again, or a requeue, goes on from the last checkpoint of the run.
#
#SBATCH --job-name=zeda-stage1
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

set -euo pipefail

# ---- Yours to change, here or in the environment -------------------------------------------------------------------
# Python that has megatron-zeda's dependencies. Empty: .venv of the repository, else python3.
ZEDA_PYTHON=${ZEDA_PYTHON:-}
# Image to run in (needs pyxis): a .sqsh file, or a registry reference as pyxis writes it. Empty: no container.
ZEDA_CONTAINER_IMAGE=${ZEDA_CONTAINER_IMAGE:-}
# More SRC:DST mounts for the container, separated by commas. The repository and this directory are always mounted.
ZEDA_CONTAINER_MOUNTS=${ZEDA_CONTAINER_MOUNTS:-}
# The repository. Empty: found from where this script was submitted.
ZEDA_HOME=${ZEDA_HOME:-}
# --------------------------------------------------------------------------------------------------------------------

# zeda_stage2.sh runs this script, too.
name=${ZEDA_SCRIPT:-zeda_stage1.sh}

die() {
    echo "$name: error: $*" >&2
    exit 2
}

is_repository() {
    [[ -d $1/megatron_zeda && -f $1/slurm/zeda_stage1.sh ]]
}

# Slurm runs a copy of this script in a spool folder; the job's record knows the original. Some versions put the
# arguments behind its path, so words are taken off until a file is left.
submitted_script() {
    local command
    command=$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | sed -n 's/^ *Command=//p')
    while [[ -n $command && ! -f $command && $command == *" "* ]]; do
        command=${command% *}
    done
    [[ -f $command ]] && printf '%s\n' "$command"
}

find_repository() {
    local script candidate
    script=${BASH_SOURCE[0]}
    if [[ -n ${SLURM_JOB_ID:-} ]]; then
        script=$(submitted_script) || script=${BASH_SOURCE[0]}
    fi
    for candidate in "$(dirname -- "$script")/.." "${SLURM_SUBMIT_DIR:-.}" "${SLURM_SUBMIT_DIR:-.}/.."; do
        if is_repository "$candidate"; then
            (cd -- "$candidate" && pwd)
            return
        fi
    done
    return 1
}

if [[ -z $ZEDA_HOME ]]; then
    ZEDA_HOME=$(find_repository) || die "the repository was not found; set ZEDA_HOME to it"
fi
is_repository "$ZEDA_HOME" || die "ZEDA_HOME=$ZEDA_HOME is not the repository"

config=$ZEDA_HOME/examples/qwen3_30b_a3b/stage1.yaml
if [[ $# -gt 0 && ($1 == *.yaml || $1 == *.yml) && (-f $1 || $1 != *=*) ]]; then
    config=$1
    shift
fi
[[ -f $config ]] || die "$config: the configuration file does not exist (looked for it from $PWD)"

container=()
if [[ -n $ZEDA_CONTAINER_IMAGE ]]; then
    if [[ $ZEDA_CONTAINER_IMAGE == [./]* || $ZEDA_CONTAINER_IMAGE == *.sqsh ]]; then
        [[ -f $ZEDA_CONTAINER_IMAGE ]] || die "ZEDA_CONTAINER_IMAGE=$ZEDA_CONTAINER_IMAGE does not exist"
    fi
    mounts=$ZEDA_HOME:$ZEDA_HOME,$PWD:$PWD${ZEDA_CONTAINER_MOUNTS:+,$ZEDA_CONTAINER_MOUNTS}
    container=(--container-image="$ZEDA_CONTAINER_IMAGE" --container-mounts="$mounts" --container-workdir="$PWD")
    ZEDA_PYTHON=${ZEDA_PYTHON:-python3}
elif [[ -z $ZEDA_PYTHON ]]; then
    ZEDA_PYTHON=python3
    [[ -x $ZEDA_HOME/.venv/bin/python ]] && ZEDA_PYTHON=$ZEDA_HOME/.venv/bin/python
fi

if [[ -z ${MASTER_ADDR:-} ]]; then
    hosts=$(scontrol show hostnames "${SLURM_JOB_NODELIST:?is not set: submit this script with sbatch}")
    MASTER_ADDR=${hosts%%$'\n'*}
fi
export MASTER_ADDR
# All tasks agree on it, and two jobs on one machine differ.
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
export PYTHONPATH=$ZEDA_HOME${PYTHONPATH:+:$PYTHONPATH}
# Megatron-Core's order of kernels under tensor parallelism relies on one hardware queue.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
    # srun does not take it over from sbatch since Slurm 22.05.
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}
fi

echo "$name: job ${SLURM_JOB_ID:-?} on ${SLURM_JOB_NODELIST:-?}, restart ${SLURM_RESTART_COUNT:-0}: $config" "$@"
# exec: signals and the exit code are srun's own. One lost task ends all.
exec srun --kill-on-bad-exit=1 "${container[@]}" "$ZEDA_PYTHON" -m megatron_zeda train "$config" "$@"
