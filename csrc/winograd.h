// What winograd_cpu.cpp and the kernels for each instruction set know of each other.

#pragma once

#include <cstdint>
#include <cstring>

namespace tensormask {
namespace winograd {

constexpr int64_t RESULTS = 4;  // of a tile, in each direction
constexpr int64_t INPUTS = 6;   // that they read

// A map in channels_last.
template <typename T>
struct Map {
  T* data;
  int64_t image, row, column;  // steps in memory; that of channels is 1
  int64_t num, height, width;

  T* at(int64_t n, int64_t y, int64_t x) const {
    if (n >= num || y < 0 || y >= height || x < 0 || x >= width) return nullptr;
    return data + n * image + y * row + x * column;
  }
};

// The tiles of a chunk, and where the first of them stands. The last may lie beyond the map.
struct Chunk {
  int64_t rows, columns, channels;
  int64_t image, row;
  int64_t matrix;  // step from one of the 36 matrices (tiles, channels) to the next

  void place(int64_t tile, int64_t* n, int64_t* y, int64_t* x) const {
    *n = image + tile / (rows * columns);
    *y = row + tile / columns % rows * RESULTS;
    *x = tile % columns * RESULTS;
  }
};

}  // namespace winograd

// Tiles `begin` to `end` of a chunk: of inputs to matrices (B^T d B), of gradients to matrices
// (A d A^T), and of matrices to results (A^T m A), a bias added.
#define TENSORMASK_WINOGRAD                                                                      \
  template <typename T>                                                                          \
  void winograd_input(                                                                           \
      const winograd::Map<const T>& map, int64_t padding, const winograd::Chunk& chunk,          \
      T* matrices, int64_t begin, int64_t end);                                                  \
  template <typename T>                                                                          \
  void winograd_grad(                                                                            \
      const winograd::Map<const T>& map, const winograd::Chunk& chunk, T* matrices,              \
      int64_t begin, int64_t end);                                                               \
  template <typename T>                                                                          \
  void winograd_output(                                                                          \
      const T* matrices, const T* bias, const winograd::Chunk& chunk,                            \
      const winograd::Map<T>& map, int64_t begin, int64_t end);

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
      const winograd::Map<const T>&, int64_t, const winograd::Chunk&, T*, int64_t, int64_t);     \
  template void winograd_grad<T>(                                                                \
      const winograd::Map<const T>&, const winograd::Chunk&, T*, int64_t, int64_t);              \
  template void winograd_output<T>(                                                              \
      const T*, const T*, const winograd::Chunk&, const winograd::Map<T>&, int64_t, int64_t);

}  // namespace tensormask
