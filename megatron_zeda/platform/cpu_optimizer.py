"""Megatron-Core's optimizer with Adam states in host memory, on a machine that has nothing but host memory.

``HybridDeviceOptimizer`` keeps a copy of every offloaded parameter in host memory and finds its way from the copy to
the GPU's parameter by a table. On a CPU it takes every parameter for one that is there already, leaves it out of that
table, and then looks for it in it. Part of the CPU adapter: installed by :func:`megatron_zeda.platform.cpu.install`.
"""

from __future__ import annotations

from typing import Any

from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer


def patch_offloaded_optimizer() -> None:
    """Let ``HybridDeviceOptimizer`` offload from the CPU to the CPU; whatever the fraction, it offloads everything."""
    split = HybridDeviceOptimizer._get_sub_optimizer_param_groups

    def split_on_cpu(self: Any, offload_fraction: float) -> Any:
        cpu_groups, gpu_groups, gpu_to_cpu, cpu_to_gpu, to_fp32 = split(self, offload_fraction)
        for group in self.param_groups:
            for parameter in group["params"]:
                copy = to_fp32.get(parameter, parameter)  # an fp32 parameter is its own copy
                gpu_to_cpu[parameter], cpu_to_gpu[copy] = copy, parameter
        return cpu_groups, gpu_groups, gpu_to_cpu, cpu_to_gpu, to_fp32

    HybridDeviceOptimizer._get_sub_optimizer_param_groups = split_on_cpu
