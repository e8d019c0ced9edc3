// What the CUDA kernels share: the shared memory of a block, and accesses of 16 bytes.

#pragma once

namespace tensormask {
namespace cuda {

constexpr int MAX_SHARED_BYTES = 48 * 1024;  // every GPU has them without being asked

// Values that one instruction reads or writes.
template <typename T>
struct alignas(16) Vector {
  static constexpr int SIZE = 16 / sizeof(T);
  T value[SIZE];
};

}  // namespace cuda
}  // namespace tensormask
