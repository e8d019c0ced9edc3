// What the CUDA operators share: how kernels are declared and launched. Included before the kernels.

#pragma once

#include "tensor_checks.h"

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <cstdint>
#include <limits>

#define TENSORMASK_KERNEL __global__
#define TENSORMASK_DEVICE __device__

namespace tensormask {
namespace cuda {

template <typename A>
__device__ A* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<A*>(memory);
}

__device__ inline void synchronize() { __syncthreads(); }

}  // namespace cuda

// PyTorch's current stream on the current device.
inline cudaStream_t stream_of(const Tensor& tensor) {
  void* stream = nullptr;
  const auto error = aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream);
  require(error == AOTI_TORCH_SUCCESS, "PyTorch has no stream for ", device_name(tensor));
  return static_cast<cudaStream_t>(stream);
}

constexpr int64_t MAX_BLOCKS = std::numeric_limits<int32_t>::max();  // along x
constexpr int64_t MAX_BLOCKS_YZ = 65535;

inline unsigned int grid(int64_t blocks, int64_t limit = MAX_BLOCKS) {
  require(blocks <= limit,
          "the tensor is too large for one launch: it needs ", blocks, " blocks; divide the batch");
  return static_cast<unsigned int>(blocks);
}

}  // namespace tensormask
