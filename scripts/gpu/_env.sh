# Sourced by single_node.sh and slurm.sbatch: what JAX is told on GPUs. Everything can be overridden
# from the environment. XLA ends at once on a flag it does not know, so there are few.
# shellcheck shell=bash

# Overlaps communication with computation; off by default in XLA, on in NVIDIA's images of JAX
# (https://docs.nvidia.com/jax-toolbox/environment-variables). What the user sets comes last and wins.
export XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true${XLA_FLAGS:+ $XLA_FLAGS}"
# Of a GPU's memory; JAX takes 0.75 unless told. NVIDIA's guide: 0.8 to 0.9, the rest is NCCL's and
# the libraries'.
# With the old name as well (XLA_PYTHON_CLIENT_...) JAX refuses to start.
if [[ -z "${XLA_PYTHON_CLIENT_MEM_FRACTION:-}" ]]; then
  export XLA_CLIENT_MEM_FRACTION="${XLA_CLIENT_MEM_FRACTION:-0.9}"
fi
# NCCL chooses well by itself; with WARN it says why where it fails.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

source scripts/_run.sh

# Prints what is exported above, where nothing is run.
show_environment() {
  [[ -z "${DRY_RUN:-}" ]] && return
  local name
  for name in XLA_FLAGS XLA_CLIENT_MEM_FRACTION NCCL_DEBUG; do
    if [[ -n "${!name:-}" ]]; then echo "export $name=${!name@Q}"; fi
  done
}
