// Rows of memory with their weights, the first step of every CUDA kernel.

#pragma once

#include "cuda_block.h"
#include "swap_align2nat.h"

namespace tensormask {
namespace cuda {

constexpr int THREADS = 256;
constexpr int CHANNELS_AT_ONCE = 4;  // per block
constexpr int WINDOW_THREADS = 128;

template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

// As `row_taps`, without 64-bit divisions.
template <typename A>
struct Taps {
  int lower;
  A fraction;
};

template <typename A>
TENSORMASK_HOST_DEVICE inline Taps<A> taps_of(int r, int lambda) {
  const int above = 2 * r + 1 - lambda;
  const A fraction = static_cast<A>(above) / static_cast<A>(2 * lambda);
  if (above < 0) return {-1, fraction + A(1)};
  return {0, fraction};
}

TENSORMASK_HOST_DEVICE inline int skewed(int i) { return i + (i >> 5); }

// Four rows of memory with their weights; a row of weight 0 is unused. All indices into the arrays
// are known at compile time, so that the arrays are kept in registers.
template <typename T, typename A>
struct Rows {
  const T* row[4] = {};
  A weight[4] = {};

  TENSORMASK_HOST_DEVICE bool any() const {
    return weight[0] != A(0) || weight[1] != A(0) || weight[2] != A(0) || weight[3] != A(0);
  }

  TENSORMASK_HOST_DEVICE A missing() const {
    return A(1) - weight[0] - weight[1] - weight[2] - weight[3];
  }

  TENSORMASK_HOST_DEVICE A at(int64_t offset) const {
    A sum = A(0);
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (weight[k] != A(0)) sum += weight[k] * static_cast<A>(row[k][offset]);
    return sum;
  }

  TENSORMASK_HOST_DEVICE void at(int64_t offset, A (&sums)[Vector<T>::SIZE]) const {
#pragma unroll
    for (int i = 0; i < Vector<T>::SIZE; ++i) sums[i] = A(0);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (weight[k] == A(0)) continue;
      const Vector<T> values = *reinterpret_cast<const Vector<T>*>(row[k] + offset);
#pragma unroll
      for (int i = 0; i < Vector<T>::SIZE; ++i)
        sums[i] += weight[k] * static_cast<A>(values.value[i]);
    }
  }
};

// Returns the rows of the input, at channel u = 0, that mask row `v` of a window in row `y` reads.
template <typename T, typename A>
TENSORMASK_HOST_DEVICE Rows<T, A> rows_read(
    const Geometry& g, const View<const T>& in, int64_t n, int v, int64_t y) {
  Rows<T, A> rows;
  const int lambda = static_cast<int>(g.lambda);
  const int64_t location = y * lambda + v - g.shift;
  const Taps<A> taps = taps_of<A>(v % lambda, lambda);
  const A share = g.averages ? A(0.5) : A(1);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (i > int(g.averages) || location + i < 0 || location + i >= g.height) continue;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int channel = v / lambda + taps.lower + j;
      if (channel < 0 || channel >= g.side) continue;
      rows.row[2 * i + j] = in.data + n * in.n + channel * g.side * in.c + (location + i) * in.y;
      rows.weight[2 * i + j] = share * (j ? taps.fraction : A(1) - taps.fraction);
    }
  }
  return rows;
}

}  // namespace cuda
}  // namespace tensormask
