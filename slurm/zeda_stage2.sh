#!/usr/bin/env bash
# Stage 2 on a Slurm cluster, one task per GPU:
#
#   sbatch [sbatch flags] slurm/zeda_stage2.sh [CONFIG.yaml] [section.key=value ...]
#
# Without a CONFIG.yaml it trains examples/qwen3_30b_a3b/stage2.yaml. Everything else is as zeda_stage1.sh says, which
# does the work: paths, the settings in the environment (ZEDA_PYTHON, ZEDA_CONTAINER_IMAGE, ...), signals and requeues.
#
#SBATCH --job-name=zeda-stage2
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=48:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

set -euo pipefail

# Slurm runs a copy of this script in a spool folder; the job's record knows the original. Some versions put the
# arguments behind its path, so words are taken off until a file is left.
find_repository() {
    local script=${BASH_SOURCE[0]} command="" candidate
    if [[ -n ${SLURM_JOB_ID:-} ]]; then
        command=$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | sed -n 's/^ *Command=//p') || command=""
        while [[ -n $command && ! -f $command && $command == *" "* ]]; do
            command=${command% *}
        done
        [[ ! -f $command ]] || script=$command
    fi
    for candidate in "$(dirname -- "$script")/.." "${SLURM_SUBMIT_DIR:-.}" "${SLURM_SUBMIT_DIR:-.}/.."; do
        if [[ -d $candidate/megatron_zeda && -f $candidate/slurm/zeda_stage1.sh ]]; then
            (cd -- "$candidate" && pwd)
            return
        fi
    done
    return 1
}

if [[ -z ${ZEDA_HOME:-} ]]; then
    ZEDA_HOME=$(find_repository) || {
        echo "zeda_stage2.sh: error: the repository was not found; set ZEDA_HOME to it" >&2
        exit 2
    }
fi
export ZEDA_HOME ZEDA_SCRIPT=zeda_stage2.sh
config=$ZEDA_HOME/examples/qwen3_30b_a3b/stage2.yaml
if [[ $# -gt 0 && ($1 == *.yaml || $1 == *.yml) && (-f $1 || $1 != *=*) ]]; then
    config=$1
    shift
fi
exec bash "$ZEDA_HOME/slurm/zeda_stage1.sh" "$config" "$@"
