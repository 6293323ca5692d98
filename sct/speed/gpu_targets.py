"""Describe GPUs to XLA, so that programs can be compiled for GPUs that this machine does not have.

Requirements: jax-cuda12-plugin and jax-cuda12-pjrt in the version of jax, and nvidia-cuda-nvcc-cu12. cuDNN attention
also needs nvidia-cudnn-cu12, nvidia-cublas-cu12 and nvidia-cuda-nvrtc-cu12, with their `lib` folders in
LD_LIBRARY_PATH.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jax.experimental import topologies

# Without a GPU, XLA cannot choose kernels by their measured time. The other options shorten the compilation to machine
# code, which does not change the list of kernels.
OPTIONS = {
    "xla_gpu_autotune_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_backend_optimization_level": 0,
}
_DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {cache}
  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  shared_memory_per_block_optin: {optin}
  cuda_compute_capability {{ major: {major} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
device_description_str: "{name}"
"""


@dataclasses.dataclass(frozen=True)
class GpuTarget:
    """A GPU for which programs can be compiled.

    Attributes
    ----------
    name, capability
        Name, and compute capability.
    cores, fpus, clock, cache, shared, optin, memory
        Multiprocessors, floating-point units of each, clock rate in GHz, and bytes of the L2 cache, of the shared
        memory of a multiprocessor and of a block, and of the device.
    flops, bandwidth
        Peak rate of bfloat16 matrix products in operations per second, and of the memory in bytes per second, by the
        vendor's data sheet.
    """

    name: str
    capability: int
    cores: int
    fpus: int
    clock: float
    cache: int
    shared: int
    optin: int
    memory: int
    flops: float
    bandwidth: float

    def devices(self, hosts: str = "1x1x1") -> list[Any]:
        """Return devices of this type for compilation only.

        `hosts` is "AxBxC": A slices of B hosts with C devices each.
        """
        text = _DESCRIPTION.format(
            shared=self.shared, cores=self.cores, fpus=self.fpus, bandwidth=int(self.bandwidth), cache=self.cache,
            clock=self.clock, memory=self.memory, optin=self.optin, major=self.capability, name=self.name,
        )  # fmt: skip
        topology = topologies.get_topology_desc(self.name, "cuda", target_config=text, topology=hosts)
        return list(topology.devices)


TARGETS = {
    "a100": GpuTarget(
        "NVIDIA A100-SXM4-80GB",
        8,
        108,
        64,
        1.41,
        41943040,
        167936,
        166912,
        85100068864,
        312e12,
        2039040000000,
    ),
    "h100": GpuTarget(
        "NVIDIA H100 80GB HBM3", 9, 132, 128, 1.98, 52428800, 233472, 232448, 85045805056, 989e12, 3.35e12
    ),
    "h200": GpuTarget(
        "NVIDIA H200", 9, 132, 128, 1.98, 62914560, 233472, 232448, 150754820096, 989e12, 4.8e12
    ),
}
