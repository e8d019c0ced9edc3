// Declarations shared by layer_norm_cpu.cpp and the kernels of layer norms for each instruction set.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace tensormask {
namespace layer_norm {

constexpr int64_t LINES = 4;  // cache lines of a block, in each channel

// A contiguous feature map (N, C, locations), in blocks of neighboring locations of an image.
struct Map {
  int64_t num, channels, locations;
  int64_t block;  // locations

  int64_t blocks() const { return (locations + block - 1) / block; }
};

}  // namespace layer_norm

// Normalize the blocks `begin` to `end` over the channels; and compute the gradients, with `sums`
// (2, C), those of weight and bias.
#define TENSORMASK_LAYER_NORM                                                                    \
  template <typename T>                                                                          \
  void layer_norm_forward(                                                                       \
      const layer_norm::Map& map, const T* x, const T* weight, const T* bias, double eps,        \
      T* out, T* mean, T* rstd, int64_t begin, int64_t end);                                     \
  template <typename T>                                                                          \
  void layer_norm_backward(                                                                      \
      const layer_norm::Map& map, const T* grad, const T* x, const T* mean, const T* rstd,       \
      const T* weight, T* out, T* sums, int64_t begin, int64_t end);

namespace baseline {
TENSORMASK_LAYER_NORM
}
namespace avx2 {
TENSORMASK_LAYER_NORM
}
namespace avx512 {
TENSORMASK_LAYER_NORM
}

#define TENSORMASK_INSTANTIATE_LAYER_NORM(T)                                                     \
  template void layer_norm_forward<T>(                                                           \
      const layer_norm::Map&, const T*, const T*, const T*, double, T*, T*, T*, int64_t,         \
      int64_t);                                                                                  \
  template void layer_norm_backward<T>(                                                          \
      const layer_norm::Map&, const T*, const T*, const T*, const T*, const T*, T*, T*, int64_t, \
      int64_t);

}  // namespace tensormask
