// The CUDA kernels: no atomics, each value of a result is written once, by one thread.
//
// A *place number* is a place plus `shift`: window * lambda + mask row, never negative (see
// swap_align2nat.h). In these numbers the operation is local: output (v, y) with v = q * lambda + r
// belongs to the number (y + q) * lambda + r, and reads its place, the next place, and the channels
// around q. So a block takes one number along H and a range of them along W, and goes through the
// channels q, whose rows of memory it then finds in the L1 cache.
//
// The two axis pairs follow each other, as on the CPU: a first pass sums at most four rows of
// memory, read side by side, into shared memory; a second pass reads that along W. Shared memory is
// skewed by one in 32, so that steps of lambda do not meet in one bank.
//
// Only what the language gives is used here, no header of CUDA or PyTorch: tests/cuda_on_cpu.cpp
// runs these kernels on the CPU.

#pragma once

#include "swap_align2nat.h"

namespace tensormask {
namespace cuda {

constexpr int THREADS = 256;
constexpr int CHANNELS_AT_ONCE = 4;  // that a block goes through
constexpr int MAX_SHARED_BYTES = 48 * 1024;
constexpr int WINDOW_THREADS = 128;

template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

// Values that are read by one instruction.
template <typename T>
struct alignas(16) Vector {
  static constexpr int SIZE = 16 / sizeof(T);
  T value[SIZE];
};

// As `row_taps`, without divisions in 64 bits.
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

// Four rows of memory with their weights; one of weight 0 is not there. Every place in the arrays
// is known when this is compiled, so that they lie in registers.
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

// The rows of the input that mask row `v` of a window in row `y` reads, at channel u = 0.
template <typename T, typename A>
TENSORMASK_HOST_DEVICE Rows<T, A> rows_read(
    const Geometry& g, const View<const T>& in, int64_t n, int v, int64_t y) {
  Rows<T, A> rows;
  const int lambda = static_cast<int>(g.lambda);
  const int64_t place = y * lambda + v - g.shift;
  const Taps<A> taps = taps_of<A>(v % lambda, lambda);
  const A share = g.averages ? A(0.5) : A(1);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (i > int(g.averages) || place + i < 0 || place + i >= g.height) continue;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int channel = v / lambda + taps.lower + j;
      if (channel < 0 || channel >= g.side) continue;
      rows.row[2 * i + j] = in.data + n * in.n + channel * g.side * in.c + (place + i) * in.y;
      rows.weight[2 * i + j] = share * (j ? taps.fraction : A(1) - taps.fraction);
    }
  }
  return rows;
}

// ---- dense, forward ----

// How the blocks of a dense kernel cut the work: `numbers` along H times `tiles` along W of
// `tile` windows (forward) or places (backward) times `parts` of the channels, for each image.
struct Cut {
  int64_t numbers;
  int tiles, tile, parts;
  int length;  // place numbers of a tile, and so values of a channel in shared memory

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
  if (tile < 1) return {0, 0, 0, 0, 0};  // too large a lambda: no shared memory
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

// Sums of rows into `shared` for all channels u and the places [first, first + length); places
// outside of the map get `pad`.
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
  for (int k = 0; k < 4; ++k)  // a row that is not there is at 0
    vectors = vectors && reinterpret_cast<uintptr_t>(rows.row[k]) % 16 == 0;
  if (vectors) {
    // In steps of whole vectors from an aligned place; the rim is filled by value.
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
  // Neighbouring threads read neighbouring memory: along u where channels lie side by side.
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

  // Lanes of a warp go along x, or share rows of several u where these are short.
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

// ---- dense, backward: each input value gathered from the outputs that it went to ----

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

// The rows of the output, at u = 0, that mask row `v` at place `h` of the input went to.
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
  // The place numbers along W that the tile reads, and their windows.
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
          const int q = u - (2 * r + 1 < lambda ? -1 : 0);  // the one whose lower channel is u
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

// ---- at windows ----

// The output value at mask column `u` of a window in column `x`, of a mask row with these `rows`.
template <typename T, typename A>
TENSORMASK_HOST_DEVICE A value_at(
    const Geometry& g, const View<const T>& in, const Rows<T, A>& rows, A constant, A pad, int u,
    int64_t x) {
  const int lambda = static_cast<int>(g.lambda);
  const int q = u / lambda;
  const Taps<A> taps = taps_of<A>(u - q * lambda, lambda);
  const int64_t place = x * lambda + u - g.shift;
  A values[2] = {pad, pad};
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int channel = q + taps.lower + j;
    if (channel < 0 || channel >= g.side || (j && taps.fraction == A(0))) continue;
    A sum = A(0);
    for (int i = 0; i <= int(g.averages); ++i) {
      const bool inside = place + i >= 0 && place + i < g.width;
      sum += inside ? constant + rows.at(channel * in.c + (place + i) * in.x) : pad;
    }
    values[j] = g.averages ? A(0.5) * sum : sum;
  }
  if (taps.fraction == A(0)) return values[0];
  return values[0] + taps.fraction * (values[1] - values[0]);
}

// Only the device can see whether a window is on the grid; one that is not reads padding.
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

// The dense operation where lambda is too large for shared memory: a block for each output row.
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

// ---- backward at windows ----

// Which windows stand at each place of the grid: `head` has the number of the first, and `next`
// of the one after each, in their order; -1 ends. Both hold int64, as windows do.
TENSORMASK_KERNEL inline void link_windows(
    Geometry g, const int64_t* windows, int64_t count, int64_t* head, int64_t* next) {
  const int64_t k = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (k >= count) return;
  const int64_t n = windows[k * 3], y = windows[k * 3 + 1], x = windows[k * 3 + 2];
  int64_t before = 0, after = k + 1;
  const auto same = [&](int64_t j) {
    return windows[j * 3] == n && windows[j * 3 + 1] == y && windows[j * 3 + 2] == x;
  };
  while (before < k && !same(before)) ++before;
  while (after < count && !same(after)) ++after;
  next[k] = after < count ? after : -1;
  if (before == k && on_grid(g, windows + k * 3)) head[(n * g.out_height + y) * g.out_width + x] = k;
}

// What one axis of the input value (channel, place) went to: four pairs of a window on the grid and
// a mask row, and their weights; a pair of weight 0 is not there.
template <typename A>
struct Readers {
  int window[4] = {}, mask_row[4] = {};
  A weight[4] = {};
};

template <typename A>
TENSORMASK_HOST_DEVICE Readers<A> readers_of(
    const Geometry& g, int channel, int place, int64_t num_windows) {
  Readers<A> readers;
  const int lambda = static_cast<int>(g.lambda);
  const A share = g.averages ? A(0.5) : A(1);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (i > int(g.averages)) continue;
    const int number = place - i + static_cast<int>(g.shift);
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

// A block for each row (n, v, u, h) of the input.
template <typename T>
TENSORMASK_KERNEL void windows_backward(
    Geometry g, View<const T> grad, const int64_t* head, const int64_t* next, T* out) {
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
      if (rows.weight[i] == A(0)) continue;
      const int64_t* const heads = head + (n * g.out_height + rows.window[i]) * g.out_width;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (columns.weight[j] == A(0)) continue;
        for (int64_t k = heads[columns.window[j]]; k >= 0; k = next[k])
          sum += rows.weight[i] * columns.weight[j] *
              static_cast<A>(
                  grad.data[k * grad.n + rows.mask_row[i] * grad.y + columns.mask_row[j] * grad.x]);
      }
    }
    target[w] = static_cast<T>(sum);
  }
}

// The dense operation backward where masks are too large for shared memory, a block for each row.
template <typename T>
TENSORMASK_KERNEL void dense_backward_directly(Geometry g, View<const T> grad, T* out) {
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
        sum += weight *
            static_cast<A>(grad.data[n * grad.n +
                                     (rows.mask_row[i] * g.out_side + columns.mask_row[j]) * grad.c +
                                     rows.window[i] * grad.y + columns.window[j] * grad.x]);
      }
    }
    target[w] = static_cast<T>(sum);
  }
}

}  // namespace cuda
}  // namespace tensormask
