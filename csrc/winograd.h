// Declarations shared by winograd_cpu.cpp and the Winograd kernels for each instruction set.

#pragma once

#include <cstdint>
#include <cstring>

namespace tensormask {
namespace winograd {

constexpr int64_t RESULTS = 4;  // of a tile, in each direction
constexpr int64_t INPUTS = 6;   // that a tile reads, in each direction

// A feature map in channels_last.
template <typename T>
struct FeatureMap {
  T* data;
  int64_t image, row, column;  // steps in memory; the step of channels is 1
  int64_t num, height, width;

  T* at(int64_t n, int64_t y, int64_t x) const {
    if (n >= num || y < 0 || y >= height || x < 0 || x >= width) return nullptr;
    return data + n * image + y * row + x * column;
  }
};

// The tiles of a chunk, and the location of the first. The last may extend beyond the feature map.
struct Chunk {
  int64_t rows, columns, channels;
  int64_t image, row;
  int64_t matrix;  // step from one of the 36 matrices (tiles, channels) to the next

  void locate(int64_t tile, int64_t* n, int64_t* y, int64_t* x) const {
    *n = image + tile / (rows * columns);
    *y = row + tile / columns % rows * RESULTS;
    *x = tile % columns * RESULTS;
  }
};

}  // namespace winograd

// Transform the tiles `begin` to `end` of a chunk: inputs to matrices (B^T d B), gradients to
// matrices (A d A^T), and matrices to results (A^T m A, plus a bias).
#define TENSORMASK_WINOGRAD                                                                      \
  template <typename T>                                                                          \
  void winograd_input(                                                                           \
      const winograd::FeatureMap<const T>& map, int64_t padding, const winograd::Chunk& chunk,   \
      T* matrices, int64_t begin, int64_t end);                                                  \
  template <typename T>                                                                          \
  void winograd_grad(                                                                            \
      const winograd::FeatureMap<const T>& map, const winograd::Chunk& chunk, T* matrices,       \
      int64_t begin, int64_t end);                                                               \
  template <typename T>                                                                          \
  void winograd_output(                                                                          \
      const T* matrices, const T* bias, const winograd::Chunk& chunk,                            \
      const winograd::FeatureMap<T>& map, int64_t begin, int64_t end);

namespace baseline {
TENSORMASK_WINOGRAD
}
namespace avx2 {
TENSORMASK_WINOGRAD
}
namespace avx512 {
TENSORMASK_WINOGRAD
}

#define TENSORMASK_INSTANTIATE_WINOGRAD(T)                                                       \
  template void winograd_input<T>(                                                               \
      const winograd::FeatureMap<const T>&, int64_t, const winograd::Chunk&, T*, int64_t,        \
      int64_t);                                                                                  \
  template void winograd_grad<T>(                                                                \
      const winograd::FeatureMap<const T>&, const winograd::Chunk&, T*, int64_t, int64_t);       \
  template void winograd_output<T>(                                                              \
      const T*, const T*, const winograd::Chunk&, const winograd::FeatureMap<T>&, int64_t,       \
      int64_t);

}  // namespace tensormask
