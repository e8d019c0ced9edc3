// The CUDA kernels for all windows, forward and backward.

#pragma once

#include "swap_align2nat_cuda_rows.h"

namespace tensormask {
namespace cuda {

// ---- dense, forward ----

// How a dense kernel is divided into blocks, for each image: `numbers` along H, times `tiles` along
// W of `tile` windows (forward) or locations (backward), times `parts` of the channels.
struct Cut {
  int64_t numbers;
  int tiles, tile, parts;
  int length;  // location numbers of a tile: values of a channel in shared memory

  TENSORMASK_HOST_DEVICE int64_t blocks(int64_t num_images) const {
    return num_images * numbers * tiles * parts;
  }
};

template <typename T>
Cut cut_forward(const Geometry& g) {
  using A = typename Accumulate<T>::type;
  const int64_t windows = g.out_width + g.side - 1;  // numbers / lambda along W
  // Room for lambda fractions, and for `side` channels of tile * lambda + 1 skewed values.
  const int64_t room = MAX_SHARED_BYTES / int64_t(sizeof(A)) - g.lambda;
  const int64_t length = (room / g.side - 2) * 32 / 33;
  int64_t tile = (length - 1) / g.lambda;
  if (tile < 1) return {0, 0, 0, 0, 0};  // lambda is too large for shared memory
  const int64_t tiles = (windows + tile - 1) / tile;
  tile = (windows + tiles - 1) / tiles;
  const int64_t parts = (g.side + CHANNELS_AT_ONCE - 1) / CHANNELS_AT_ONCE;
  return {g.lambda * (g.out_height + g.side - 1), int(tiles), int(tile), int(parts),
          int(tile * g.lambda + g.averages)};
}

template <typename T>
int64_t shared_bytes(const Geometry& g, const Cut& cut) {
  using A = typename Accumulate<T>::type;
  return (g.lambda + g.side * (skewed(cut.length) + 1)) * int64_t(sizeof(A));
}

// Writes sums of rows to `shared`, for all channels u and the locations [first, first + length).
// Locations outside of the input get `pad`.
template <typename T, typename A>
TENSORMASK_DEVICE void sum_into(
    const Geometry& g, const View<const T>& in, const Rows<T, A>& rows, A pad, int first, int length,
    A* shared) {
  const int side = static_cast<int>(g.side), width = static_cast<int>(g.width);
  const int pitch = skewed(length) + 1;
  const A constant = rows.missing() * pad;
  constexpr int SIZE = Vector<T>::SIZE;
  const bool any = rows.any();
  bool vectors = in.x == 1 && in.c % SIZE == 0;
#pragma unroll
  for (int k = 0; k < 4; ++k)  // an unused row is a null pointer
    vectors = vectors && reinterpret_cast<uintptr_t>(rows.row[k]) % 16 == 0;
  if (vectors) {
    // In steps of vectors from an aligned location; the rest is read value by value.
    const int start = first >= 0 ? first / SIZE * SIZE : -((-first + SIZE - 1) / SIZE * SIZE);
    const int count = (first + length - start + SIZE - 1) / SIZE;
    for (int t = threadIdx.x; t < side * count; t += blockDim.x) {
      const int u = t / count, w = start + (t - u * count) * SIZE;
      A sums[SIZE];
      const bool inside = w >= 0 && w + SIZE <= width && any;
      if (inside) rows.at(u * in.c + w, sums);
#pragma unroll
      for (int i = 0; i < SIZE; ++i) {
        const int at = w + i - first;
        if (at < 0 || at >= length) continue;
        A value = pad;
        if (inside) {
          value = constant + sums[i];
        } else if (w + i >= 0 && w + i < width) {
          value = constant + rows.at(u * in.c + w + i);
        }
        shared[u * pitch + skewed(at)] = value;
      }
    }
    return;
  }
  // Neighboring threads read neighboring memory: along u if channels are contiguous.
  const bool along_channels = in.c == 1;
  for (int t = threadIdx.x; t < side * length; t += blockDim.x) {
    const int u = along_channels ? t % side : t / length;
    const int at = along_channels ? t / side : t % length;
    const int w = first + at;
    const bool inside = w >= 0 && w < width;
    shared[u * pitch + skewed(at)] = inside ? constant + rows.at(u * in.c + w * in.x) : pad;
  }
}

template <typename T>
TENSORMASK_KERNEL void dense_forward(Geometry g, View<const T> in, T* out, double padding, Cut cut) {
  using A = typename Accumulate<T>::type;
  A* const fractions = shared_memory<A>();
  A* const shared = fractions + g.lambda;
  const int lambda = static_cast<int>(g.lambda), side = static_cast<int>(g.side);
  const int pitch = skewed(cut.length) + 1;
  const A pad = static_cast<A>(padding);
  for (int r = threadIdx.x; r < lambda; r += blockDim.x)
    fractions[r] = taps_of<A>(r, lambda).fraction;

  int64_t block = blockIdx.x;
  const int part = static_cast<int>(block % cut.parts);
  block /= cut.parts;
  const int first_window = static_cast<int>(block % cut.tiles) * cut.tile;
  block /= cut.tiles;
  const int64_t number = block % cut.numbers, n = block / cut.numbers;
  const int r_y = static_cast<int>(number % lambda);
  const int64_t window_y = number / lambda;  // y + q

  // Lanes of a warp go along x. If rows are short, a warp takes rows of several u.
  const int lanes = g.out_width > 16 ? 32 : (g.out_width > 8 ? 16 : 8);
  const int lane = threadIdx.x % lanes, line = threadIdx.x / lanes, lines = blockDim.x / lanes;
  const int q_end = min(side, (part + 1) * CHANNELS_AT_ONCE);
  for (int q = part * CHANNELS_AT_ONCE; q < q_end; ++q) {
    const int64_t y = window_y - q;
    if (y < 0 || y >= g.out_height) continue;  // the same for all threads
    const int v = q * lambda + r_y;
    const Rows<T, A> rows = rows_read<T, A>(g, in, n, v, y);
    sum_into(g, in, rows, pad, first_window * lambda - static_cast<int>(g.shift), cut.length, shared);
    synchronize();
    T* const target = out + ((n * g.out_side + v) * g.out_side * g.out_height + y) * g.out_width;
    for (int u = line; u < side * lambda; u += lines) {
      const int q_x = u / lambda, r_x = u - q_x * lambda;
      const A fraction = fractions[r_x];
      const int low = q_x + (2 * r_x + 1 < lambda ? -1 : 0), high = low + 1;
      const A* const low_row = shared + low * pitch;
      const A* const high_row = shared + high * pitch;
      T* const to = target + u * g.out_height * g.out_width;
      const int x_end = min(static_cast<int>(g.out_width), first_window + cut.tile - q_x);
      for (int x = max(0, first_window - q_x) + lane; x < x_end; x += lanes) {
        const int at = (x + q_x - first_window) * lambda + r_x;
        const int here = skewed(at), next = skewed(at + 1);
        A low_value = pad, high_value = pad;
        if (low >= 0) {
          low_value = low_row[here];
          if (g.averages) low_value = A(0.5) * (low_value + low_row[next]);
        }
        if (high < side && fraction != A(0)) {
          high_value = high_row[here];
          if (g.averages) high_value = A(0.5) * (high_value + high_row[next]);
        }
        to[x] = static_cast<T>(
            fraction == A(0) ? low_value : low_value + fraction * (high_value - low_value));
      }
    }
    synchronize();
  }
}

// ---- dense, backward: each input value is gathered from the outputs that read it ----

template <typename T>
Cut cut_backward(const Geometry& g) {
  using A = typename Accumulate<T>::type;
  const int64_t room = MAX_SHARED_BYTES / int64_t(sizeof(A)) - g.lambda;
  const int64_t length = (room / g.side - 2) * 32 / 33;
  int64_t tile = length - g.averages;
  if (tile < 32) return {0, 0, 0, 0, 0};
  const int64_t tiles = (g.width + tile - 1) / tile;
  tile = (g.width + tiles - 1) / tiles;
  const int64_t parts = (g.side + CHANNELS_AT_ONCE - 1) / CHANNELS_AT_ONCE;
  return {g.height, int(tiles), int(tile), int(parts), int(tile + g.averages)};
}

// Returns the rows of the output, at u = 0, that read mask row `v` at location `h` of the input.
template <typename T, typename A>
TENSORMASK_HOST_DEVICE Rows<T, A> rows_written(
    const Geometry& g, const View<const T>& grad, int64_t n, int v, int h) {
  Rows<T, A> rows;
  const int lambda = static_cast<int>(g.lambda);
  const A share = g.averages ? A(0.5) : A(1);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (i > int(g.averages)) continue;
    const int number = h - i + static_cast<int>(g.shift);
    const int r = number % lambda;
    const Taps<A> taps = taps_of<A>(r, lambda);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int q = v - taps.lower - j;
      const int y = number / lambda - q;
      if (q < 0 || q >= g.side || y < 0 || y >= g.out_height) continue;
      rows.row[2 * i + j] =
          grad.data + n * grad.n + (q * lambda + r) * g.out_side * grad.c + y * grad.y;
      rows.weight[2 * i + j] = share * (j ? taps.fraction : A(1) - taps.fraction);
    }
  }
  return rows;
}

template <typename T>
TENSORMASK_KERNEL void dense_backward(Geometry g, View<const T> grad, T* out, Cut cut) {
  using A = typename Accumulate<T>::type;
  A* const fractions = shared_memory<A>();
  A* const shared = fractions + g.lambda;
  const int lambda = static_cast<int>(g.lambda), side = static_cast<int>(g.side);
  const int out_width = static_cast<int>(g.out_width);
  const int pitch = skewed(cut.length) + 1;
  for (int r = threadIdx.x; r < lambda; r += blockDim.x)
    fractions[r] = taps_of<A>(r, lambda).fraction;

  int64_t block = blockIdx.x;
  const int part = static_cast<int>(block % cut.parts);
  block /= cut.parts;
  const int first = static_cast<int>(block % cut.tiles) * cut.tile;
  block /= cut.tiles;
  const int h = static_cast<int>(block % cut.numbers);
  const int64_t n = block / cut.numbers;
  // The location numbers along W that the tile reads, and their windows.
  const int begin = first - int(g.averages) + static_cast<int>(g.shift);
  const int first_window = begin / lambda;
  const int windows = (begin + cut.length - 1) / lambda - first_window + 1;
  const int lanes = windows > 16 ? 32 : (windows > 8 ? 16 : 8);
  const int lane = threadIdx.x % lanes, line = threadIdx.x / lanes, lines = blockDim.x / lanes;

  const int v_end = min(side, (part + 1) * CHANNELS_AT_ONCE);
  for (int v = part * CHANNELS_AT_ONCE; v < v_end; ++v) {
    const Rows<T, A> rows = rows_written<T, A>(g, grad, n, v, h);
    for (int u = line; u < side * lambda; u += lines) {
      const int q = u / lambda, r = u - q * lambda;
      A* const to = shared + q * pitch;
      for (int m = lane; m < windows; m += lanes) {
        const int at = (first_window + m) * lambda + r - begin;
        if (at < 0 || at >= cut.length) continue;
        const int x = first_window + m - q;
        to[skewed(at)] = x >= 0 && x < out_width ? rows.at(u * grad.c + x * grad.x) : A(0);
      }
    }
    synchronize();
    for (int u = line; u < side; u += lines) {
      T* const to = out + (((n * side + v) * side + u) * g.height + h) * g.width;
      const int w_end = min(static_cast<int>(g.width), first + cut.tile);
      for (int w = first + lane; w < w_end; w += lanes) {
        A sum = A(0);
        for (int i = 0; i <= int(g.averages); ++i) {
          const int number = w - i + static_cast<int>(g.shift), r = number % lambda;
          const int q = u - (2 * r + 1 < lambda ? -1 : 0);  // its lower channel is u
          const A fraction = fractions[r];
          const int at = skewed(number - begin);
          if (q < side) sum += (A(1) - fraction) * shared[q * pitch + at];
          if (q > 0 && fraction != A(0)) sum += fraction * shared[(q - 1) * pitch + at];
        }
        to[w] = static_cast<T>(g.averages ? A(0.5) * sum : sum);
      }
    }
    synchronize();
  }
}

}  // namespace cuda
}  // namespace tensormask
