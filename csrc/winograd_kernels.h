// CPU kernels of Winograd's F(4x4, 3x3): transform tiles to the 36 matrices and back.
//
// As with swap_align2nat_cpu_kernels.h, one file for each instruction set includes this file in its
// own namespace. A step transforms one cache line of channels of a tile.

template <typename T>
struct Lanes {
  typedef T type __attribute__((vector_size(64)));
  static constexpr int64_t COUNT = 64 / sizeof(T);
};
template <typename T>
using Line = typename Lanes<T>::type;

// Values beyond the last channel, and at a null pointer, are 0.
template <typename T>
inline void load(const T* from, int64_t channel, int64_t channels, Line<T>& line) {
  if (from != nullptr && channels - channel >= Lanes<T>::COUNT) {
    std::memcpy(&line, from + channel, sizeof(line));
  } else {
    line = Line<T>{};
    if (from != nullptr) std::memcpy(&line, from + channel, (channels - channel) * sizeof(T));
  }
}

template <typename T>
inline void store(T* to, int64_t channel, int64_t channels, const Line<T>& line) {
  const int64_t rest = channels - channel;
  std::memcpy(to + channel, &line, rest >= Lanes<T>::COUNT ? sizeof(line) : rest * sizeof(T));
}

// out = B^T d; B^T is ((4, 0, -5, 0, 1, 0), (0, -4, -4, 1, 1, 0), (0, 4, -4, -1, 1, 0),
// (0, -2, -1, 2, 1, 0), (0, 2, -1, -2, 1, 0), (0, 4, 0, -5, 0, 1)).
struct TimesB {
  static constexpr int64_t FROM = winograd::INPUTS, TO = winograd::INPUTS;
  template <typename V>
  static void apply(const V* d, V* out) {
    const V even = d[4] - 4 * d[2], odd = d[3] - 4 * d[1];
    const V near_even = d[4] - d[2], near_odd = d[3] - d[1];
    out[0] = 4 * (d[0] - d[2]) + near_even;
    out[1] = even + odd;
    out[2] = even - odd;
    out[3] = near_even + 2 * near_odd;
    out[4] = near_even - 2 * near_odd;
    out[5] = (d[5] - d[3]) - 4 * near_odd;
  }
};

// out = A d; A^T is ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0),
// (0, 1, -1, 8, -8, 1)).
struct TimesA {
  static constexpr int64_t FROM = winograd::RESULTS, TO = winograd::INPUTS;
  template <typename V>
  static void apply(const V* d, V* out) {
    const V even = d[0] + d[2], odd = d[1] + d[3];
    const V far_even = d[0] + 4 * d[2], far_odd = 2 * d[1] + 8 * d[3];
    out[0] = d[0];
    out[1] = even + odd;
    out[2] = even - odd;
    out[3] = far_even + far_odd;
    out[4] = far_even - far_odd;
    out[5] = d[3];
  }
};

// out = A^T m.
struct TimesATransposed {
  static constexpr int64_t FROM = winograd::INPUTS, TO = winograd::RESULTS;
  template <typename V>
  static void apply(const V* m, V* out) {
    const V even = m[1] + m[2], odd = m[1] - m[2];
    const V far_even = m[3] + m[4], far_odd = m[3] - m[4];
    out[0] = m[0] + even + far_even;
    out[1] = odd + 2 * far_odd;
    out[2] = even + 4 * far_even;
    out[3] = odd + 8 * far_odd + m[5];
  }
};

// Computes M d M^T of a tile: `read` sets each value of d, `write` gets each value of the result.
template <typename M, typename T, typename Read, typename Write>
inline void both_sides(Read read, Write write) {
  Line<T> half[M::TO][M::FROM], in[M::FROM], out[M::TO > M::FROM ? M::TO : M::FROM];
  for (int64_t j = 0; j < M::FROM; ++j) {
    for (int64_t i = 0; i < M::FROM; ++i) read(i, j, in[i]);
    M::apply(in, out);
    for (int64_t i = 0; i < M::TO; ++i) half[i][j] = out[i];
  }
  for (int64_t i = 0; i < M::TO; ++i) {
    M::apply(half[i], out);
    for (int64_t j = 0; j < M::TO; ++j) write(i, j, out[j]);
  }
}

// Transforms tiles of a feature map to the 36 matrices (tiles, channels).
template <typename M, typename T>
inline void spread(
    const winograd::FeatureMap<const T>& map, int64_t padding, const winograd::Chunk& chunk,
    T* matrices, int64_t begin, int64_t end) {
  for (int64_t tile = begin; tile < end; ++tile) {
    int64_t n, y, x;
    chunk.locate(tile, &n, &y, &x);
    const T* from[M::FROM][M::FROM];
    for (int64_t i = 0; i < M::FROM; ++i)
      for (int64_t j = 0; j < M::FROM; ++j)
        from[i][j] = map.at(n, y + i - padding, x + j - padding);
    T* to = matrices + tile * chunk.channels;
    for (int64_t c = 0; c < chunk.channels; c += Lanes<T>::COUNT)
      both_sides<M, T>(
          [&](int64_t i, int64_t j, Line<T>& line) { load(from[i][j], c, chunk.channels, line); },
          [&](int64_t i, int64_t j, const Line<T>& line) {
            store(to + (i * winograd::INPUTS + j) * chunk.matrix, c, chunk.channels, line);
          });
  }
}

// Transforms the 36 matrices (tiles, channels) to results of tiles, adds `bias`, and stores them.
template <typename T>
inline void gather(
    const T* matrices, const T* bias, const winograd::Chunk& chunk,
    const winograd::FeatureMap<T>& map, int64_t begin, int64_t end) {
  for (int64_t tile = begin; tile < end; ++tile) {
    int64_t n, y, x;
    chunk.locate(tile, &n, &y, &x);
    T* to[winograd::RESULTS][winograd::RESULTS];
    for (int64_t i = 0; i < winograd::RESULTS; ++i)
      for (int64_t j = 0; j < winograd::RESULTS; ++j) to[i][j] = map.at(n, y + i, x + j);
    const T* from = matrices + tile * chunk.channels;
    for (int64_t c = 0; c < chunk.channels; c += Lanes<T>::COUNT) {
      Line<T> added;
      load(bias, c, chunk.channels, added);
      both_sides<TimesATransposed, T>(
          [&](int64_t i, int64_t j, Line<T>& line) {
            load(from + (i * winograd::INPUTS + j) * chunk.matrix, c, chunk.channels, line);
          },
          [&](int64_t i, int64_t j, const Line<T>& line) {
            if (to[i][j] == nullptr) return;
            const Line<T> result = line + added;
            store(to[i][j], c, chunk.channels, result);
          });
    }
  }
}

template <typename T>
void winograd_input(
    const winograd::FeatureMap<const T>& map, int64_t padding, const winograd::Chunk& chunk,
    T* matrices, int64_t begin, int64_t end) {
  spread<TimesB>(map, padding, chunk, matrices, begin, end);
}

template <typename T>
void winograd_grad(
    const winograd::FeatureMap<const T>& map, const winograd::Chunk& chunk, T* matrices,
    int64_t begin, int64_t end) {
  spread<TimesA>(map, 0, chunk, matrices, begin, end);
}

template <typename T>
void winograd_output(
    const T* matrices, const T* bias, const winograd::Chunk& chunk,
    const winograd::FeatureMap<T>& map, int64_t begin, int64_t end) {
  gather(matrices, bias, chunk, map, begin, end);
}
