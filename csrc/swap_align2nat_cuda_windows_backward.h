// The CUDA kernels at chosen windows, backward.
//
// The gradient of the input is large, and windows reach few of its rows. Windows are sorted by their
// row of the grid, so that a block knows at once whether any window reaches its rows. If none does,
// it writes zeros. Otherwise it adds the windows to sums in shared memory, one after the other; each
// thread adds to columns of its own, so that the order of the sums is fixed. Both kinds of rows are
// written 16 bytes at a time.

#pragma once

#include "swap_align2nat_cuda_windows.h"

namespace tensormask {
namespace cuda {

constexpr int64_t SUMS_BYTES = 24 * 1024;  // of a block, so that eight share a multiprocessor

// Returns the number of the grid's row (n, y), and the number of rows for a window outside.
TENSORMASK_HOST_DEVICE inline int row_of(const Geometry& g, const int64_t* window) {
  const int64_t row = on_grid(g, window) ? window[0] * g.out_height + window[1]
                                         : g.num_images * g.out_height;
  return static_cast<int>(row);
}

// Sorts windows by row, in their own order within a row, for all rows and one more: position
// `starts[row]` is the first of the row in `order` (the window) and `columns` (its x). Windows
// outside of the grid are last, in no row. A thread for each window and each of the rows.
TENSORMASK_KERNEL void sort_windows(
    Geometry g, const int64_t* windows, int count, int* starts, int* order, int* columns) {
  int* const keys = shared_memory<int>();  // of as many windows as a block has threads
  const int own = static_cast<int>(int64_t(blockIdx.x) * blockDim.x + threadIdx.x);
  const int key = own < count ? row_of(g, windows + int64_t(own) * 3) : 0;
  int position = 0, start = 0;
  for (int first = 0; first < count; first += blockDim.x) {
    const int length = min(static_cast<int>(blockDim.x), count - first);
    synchronize();
    if (static_cast<int>(threadIdx.x) < length)
      keys[threadIdx.x] = row_of(g, windows + (int64_t(first) + threadIdx.x) * 3);
    synchronize();
#pragma unroll 8
    for (int i = 0; i < length; ++i) {
      position += keys[i] < key || (keys[i] == key && first + i < own);
      start += keys[i] < own;
    }
  }
  if (own < count) {
    order[position] = own;
    columns[position] = static_cast<int>(windows[int64_t(own) * 3 + 2]);
  }
  if (own <= g.num_images * g.out_height) starts[own] = start;
}

// What reads a location along one axis: the mask pixel `number - window * lambda` of each window
// and, if locations are averaged, also the pixel before. Pixel i (0 or 1) reads the channels
// `channel - window + c` with the weights share[i][c], integers in units of 1 / (2 lambda).
struct Location {
  int number, channel;
  int share[2][3];
};

TENSORMASK_HOST_DEVICE inline Location location_at(const Geometry& g, int location) {
  const int lambda = static_cast<int>(g.lambda);
  const int number = location + static_cast<int>(g.shift);
  int window = number / lambda, r = number - window * lambda;
  int lower[2], high[2];  // as `taps_of`
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int above = 2 * r + 1 - lambda;
    lower[i] = above < 0 ? window - 1 : window;
    high[i] = above < 0 ? above + 2 * lambda : above;
    window = r == 0 ? window - 1 : window;
    r = r == 0 ? lambda - 1 : r - 1;
  }
  if (!g.averages) return {number, lower[0], {{2 * lambda - high[0], high[0], 0}, {0, 0, 0}}};
  const int low[2] = {2 * lambda - high[0], 2 * lambda - high[1]};
  if (lower[0] == lower[1]) return {number, lower[1], {{low[0], high[0], 0}, {low[1], high[1], 0}}};
  return {number, lower[1], {{0, low[0], high[0]}, {low[1], high[1], 0}}};
}

// Writes rows of `length` values to `out + u * step`, whatever their alignment.
template <typename T, typename F>
TENSORMASK_DEVICE void write_rows(T* out, int64_t step, int side, int length, const F& value) {
  constexpr int SIZE = Vector<T>::SIZE;
  const int bits = length > 16 * SIZE ? 5 : (length > 8 * SIZE ? 4 : 3);  // 2^bits lanes a row
  const int lanes = 1 << bits, lane = threadIdx.x & (lanes - 1);
  const int lines = blockDim.x >> bits, line = threadIdx.x >> bits;
  T* row = out + line * step;
  for (int u = line; u < side; u += lines, row += lines * step) {
    const unsigned int at = static_cast<unsigned int>(reinterpret_cast<uintptr_t>(row) / sizeof(T));
    const int head = min(length, static_cast<int>(-at % SIZE));  // before the first vector
    const int end = length - SIZE;
    if (lane < head) row[lane] = static_cast<T>(value(u, lane));
    int w = head + lane * SIZE;
    for (; w <= end; w += lanes * SIZE) {
      Vector<T> values;
#pragma unroll
      for (int i = 0; i < SIZE; ++i) values.value[i] = static_cast<T>(value(u, w + i));
      *reinterpret_cast<Vector<T>*>(row + w) = values;
    }
    // One lane has the values after the last vector.
#pragma unroll 1
    for (; w < length; ++w) row[w] = static_cast<T>(value(u, w));
  }
}

// How many columns of the input a block takes; its sums are (side, columns).
template <typename A>
int64_t columns_of_block(const Geometry& g) {
  const int64_t fit = SUMS_BYTES / (g.side * int64_t(sizeof(A)));
  const int64_t parts = fit > 0 ? (g.width + fit - 1) / fit : g.width;
  return (g.width + parts - 1) / parts;
}

// A block (h, v, n) for the rows of all channels u there; where feature maps are wide, v also counts
// parts of the rows. At most three rows of the grid have windows that read (v, h).
template <typename T>
TENSORMASK_KERNEL void windows_backward(
    Geometry g, View<const T> grad, const int* starts, const int* order, const int* columns, T* out,
    int block_columns) {
  using A = typename Accumulate<T>::type;
  const int side = static_cast<int>(g.side), lambda = static_cast<int>(g.lambda);
  const int width = static_cast<int>(g.width);
  const int out_side = static_cast<int>(g.out_side), out_height = static_cast<int>(g.out_height);
  const int h = blockIdx.x, n = blockIdx.z;
  int v = blockIdx.y, first = 0;
  for (; v >= side; v -= side) first += block_columns;
  const int length = min(block_columns, width - first);
  const int64_t step = g.height * g.width;  // from u to u + 1
  T* const target = out + (int64_t(n) * side + v) * side * step + int64_t(h) * width + first;

  const Location row = location_at(g, h);
  const int* const starts_of_image = starts + n * out_height;
  int bounds[4];  // of the windows in the rows y + c
  const int y = row.channel - v;
#pragma unroll
  for (int c = 0; c < 4; ++c) bounds[c] = starts_of_image[min(max(y + c, 0), out_height)];
  bool any = false;
#pragma unroll
  for (int c = 0; c < 3; ++c)
    any = any || (bounds[c] < bounds[c + 1] && (row.share[0][c] | row.share[1][c]));
  if (!any) {  // the same for all threads
    write_rows(target, step, side, length, [](int, int) { return A(0); });
    return;
  }

  A* const sums = shared_memory<A>();
  const A unit = A(g.averages ? 0.25 : 0.5) / static_cast<A>(lambda);
  for (int w = threadIdx.x; w < length; w += blockDim.x) {
    for (int u = 0; u < side; ++u) sums[u * block_columns + w] = A(0);
    const Location column = location_at(g, first + w);
    A weight[2][3];
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      weight[0][c] = unit * static_cast<A>(column.share[0][c]);
      weight[1][c] = unit * static_cast<A>(column.share[1][c]);
    }
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      const int mask_row = row.number - (y + c) * lambda;
      const bool reads[2] = {row.share[0][c] && mask_row >= 0 && mask_row < out_side,
                             row.share[1][c] && mask_row >= 1 && mask_row <= out_side};
      if (!reads[0] && !reads[1]) continue;
      const A factor[2] = {unit * static_cast<A>(row.share[0][c]),
                           unit * static_cast<A>(row.share[1][c])};
      const T* const masks = grad.data + mask_row * grad.y;
#pragma unroll 1
      for (int position = bounds[c]; position < bounds[c + 1]; ++position) {
        const int x = columns[position], pixel = column.number - x * lambda;
        if (pixel < 0 || pixel > out_side) continue;
        const T* const at = masks + order[position] * grad.n + pixel * grad.x;
        A sum[2] = {A(0), A(0)};  // at the pixel and at the one before
        if (pixel < out_side) {
          if (reads[0]) sum[0] = factor[0] * static_cast<A>(*at);
          if (reads[1]) sum[0] += factor[1] * static_cast<A>(*(at - grad.y));
        }
        if (g.averages && pixel > 0) {
          if (reads[0]) sum[1] = factor[0] * static_cast<A>(*(at - grad.x));
          if (reads[1]) sum[1] += factor[1] * static_cast<A>(*(at - grad.x - grad.y));
        }
        const int channel = column.channel - x;
        A* const to = sums + channel * block_columns + w;
#pragma unroll
        for (int k = 0; k < 3; ++k) {
          if (channel + k < 0 || channel + k >= side) continue;
          A part = A(0);  // without weights of 0, which times NaN or infinity would be NaN
          if (weight[0][k] != A(0)) part = weight[0][k] * sum[0];
          if (weight[1][k] != A(0)) part += weight[1][k] * sum[1];
          to[k * block_columns] += part;
        }
      }
    }
  }
  synchronize();
  write_rows(target, step, side, length, [&](int u, int w) { return sums[u * block_columns + w]; });
}

}  // namespace cuda
}  // namespace tensormask
