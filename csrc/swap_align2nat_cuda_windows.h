// The CUDA kernels at chosen windows, forward; and those at all windows where lambda exceeds shared
// memory.

#pragma once

#include "swap_align2nat_cuda_rows.h"

namespace tensormask {
namespace cuda {

// Returns the output value at mask column `u` of a window in column `x`, from a mask row's `rows`.
template <typename T, typename A>
TENSORMASK_HOST_DEVICE A value_at(
    const Geometry& g, const View<const T>& in, const Rows<T, A>& rows, A constant, A pad, int u,
    int64_t x) {
  const int lambda = static_cast<int>(g.lambda);
  const int q = u / lambda;
  const Taps<A> taps = taps_of<A>(u - q * lambda, lambda);
  const int64_t location = x * lambda + u - g.shift;
  A values[2] = {pad, pad};
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int channel = q + taps.lower + j;
    if (channel < 0 || channel >= g.side || (j && taps.fraction == A(0))) continue;
    A sum = A(0);
    for (int i = 0; i <= int(g.averages); ++i) {
      const bool inside = location + i >= 0 && location + i < g.width;
      sum += inside ? constant + rows.at(channel * in.c + (location + i) * in.x) : pad;
    }
    values[j] = g.averages ? A(0.5) * sum : sum;
  }
  if (taps.fraction == A(0)) return values[0];
  return values[0] + taps.fraction * (values[1] - values[0]);
}

// Only the device can check whether a window is on the grid; outside of it, padding is read.
TENSORMASK_HOST_DEVICE inline bool on_grid(const Geometry& g, const int64_t* window) {
  return window[0] >= 0 && window[0] < g.num_images && window[1] >= 0 &&
      window[1] < g.out_height && window[2] >= 0 && window[2] < g.out_width;
}

// A block for each mask row of each window.
template <typename T>
TENSORMASK_KERNEL void windows_forward(
    Geometry g, View<const T> in, const int64_t* windows, T* out, double padding) {
  using A = typename Accumulate<T>::type;
  const int side = static_cast<int>(g.out_side);
  const int64_t k = blockIdx.x / side;
  const int v = static_cast<int>(blockIdx.x - k * side);
  const int64_t n = windows[k * 3], y = windows[k * 3 + 1], x = windows[k * 3 + 2];
  const A pad = static_cast<A>(padding);
  Rows<T, A> rows;
  if (on_grid(g, windows + k * 3)) rows = rows_read<T, A>(g, in, n, v, y);
  const A constant = rows.missing() * pad;
  const bool any = rows.any();
  T* const target = out + int64_t(blockIdx.x) * side;
  for (int u = threadIdx.x; u < side; u += blockDim.x)
    target[u] = static_cast<T>(any ? value_at(g, in, rows, constant, pad, u, x) : pad);
}

// The dense operation if lambda is too large for shared memory. A block for each output row.
template <typename T>
TENSORMASK_KERNEL void dense_forward_directly(Geometry g, View<const T> in, T* out, double padding) {
  using A = typename Accumulate<T>::type;
  int64_t block = blockIdx.x;
  const int64_t y = block % g.out_height;
  block /= g.out_height;
  const int v = static_cast<int>(block % g.out_side);
  const int64_t n = block / g.out_side;
  const A pad = static_cast<A>(padding);
  const Rows<T, A> rows = rows_read<T, A>(g, in, n, v, y);
  const A constant = rows.missing() * pad;
  T* const target = out + ((n * g.out_side + v) * g.out_side * g.out_height + y) * g.out_width;
  for (int64_t t = threadIdx.x; t < g.out_side * g.out_width; t += blockDim.x) {
    const int64_t u = t / g.out_width, x = t - u * g.out_width;
    target[u * g.out_height * g.out_width + x] =
        static_cast<T>(value_at(g, in, rows, constant, pad, static_cast<int>(u), x));
  }
}

// ---- dense, backward, if masks are too large for shared memory ----

// Which outputs read the input value (channel, location) along one axis: four pairs of a window on
// the grid and a mask row, with their weights; a pair of weight 0 is unused.
template <typename A>
struct Readers {
  int window[4] = {}, mask_row[4] = {};
  A weight[4] = {};
};

template <typename A>
TENSORMASK_HOST_DEVICE Readers<A> readers_of(
    const Geometry& g, int channel, int location, int64_t num_windows) {
  Readers<A> readers;
  const int lambda = static_cast<int>(g.lambda);
  const A share = g.averages ? A(0.5) : A(1);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (i > int(g.averages)) continue;
    const int number = location - i + static_cast<int>(g.shift);
    const int r = number % lambda;
    const Taps<A> taps = taps_of<A>(r, lambda);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int q = channel - taps.lower - j;
      const int window = number / lambda - q;
      if (q < 0 || q >= g.side || window < 0 || window >= num_windows) continue;
      readers.window[2 * i + j] = window;
      readers.mask_row[2 * i + j] = q * lambda + r;
      readers.weight[2 * i + j] = share * (j ? taps.fraction : A(1) - taps.fraction);
    }
  }
  return readers;
}

// Writes the block's row (n, v, u, h) of the input: sums the results of `read`, whose arguments are
// the image, the window's row and column, and the mask's row and column.
template <typename T, typename F>
TENSORMASK_DEVICE void gather_row(const Geometry& g, T* out, const F& read) {
  using A = typename Accumulate<T>::type;
  const int side = static_cast<int>(g.side), width = static_cast<int>(g.width);
  int64_t block = blockIdx.x;
  const int h = static_cast<int>(block % g.height);
  block /= g.height;
  const int u = static_cast<int>(block % side);
  block /= side;
  const int v = static_cast<int>(block % side);
  const int64_t n = block / side;
  const Readers<A> rows = readers_of<A>(g, v, h, g.out_height);
  T* const target = out + int64_t(blockIdx.x) * width;
  for (int w = threadIdx.x; w < width; w += blockDim.x) {
    A sum = A(0);
    const Readers<A> columns = readers_of<A>(g, u, w, g.out_width);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const A weight = rows.weight[i] * columns.weight[j];
        if (weight == A(0)) continue;
        sum += weight * read(n, rows.window[i], columns.window[j], rows.mask_row[i], columns.mask_row[j]);
      }
    }
    target[w] = static_cast<T>(sum);
  }
}

template <typename T>
TENSORMASK_KERNEL void dense_backward_directly(Geometry g, View<const T> grad, T* out) {
  using A = typename Accumulate<T>::type;
  gather_row(g, out, [&](int64_t n, int y, int x, int64_t v, int64_t u) {
    return static_cast<A>(
        grad.data[n * grad.n + (v * g.out_side + u) * grad.c + y * grad.y + x * grad.x]);
  });
}

}  // namespace cuda
}  // namespace tensormask
