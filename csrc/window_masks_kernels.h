// CPU kernels of window_masks.h. As with swap_align2nat_cpu_kernels.h, which is included before, one
// file for each instruction set includes this file in its own namespace.

constexpr int64_t MASK_LANES = window_masks::READ * window_masks::READ;
constexpr int64_t MASK_ROWS_AT_ONCE = 16;  // locations along H of which products are in memory

template <typename T>
struct MaskLanes {
  typedef T type __attribute__((vector_size(MASK_LANES * sizeof(T))));
};

// A mask row (or column) of one window: locations, and per location and channel a weight, and the
// place of the channel among those that are read at the location.
template <typename T>
struct MaskReads {
  int64_t location[2], place[2][2];
  T weight[2][2];
};

// One axis pair of one window.
template <typename T>
struct MaskAxis {
  std::vector<MaskReads<T>> reads;
  int64_t origin = 0, begin = 0, end = 0;  // the locations that are read; none if these are equal

  void set(
      const window_masks::Geometry& g, const window_masks::Channels& channels, int64_t start,
      int64_t extent) {
    reads.resize(g.out_side);
    origin = start + channels.origin;
    begin = extent;
    end = 0;
    for (int64_t row = 0; row < g.out_side; ++row) {
      const window_masks::Reads r = g.reads(row, start, extent);
      MaskReads<T>& to = reads[row];
      for (int i = 0; i < 2; ++i) {
        const int64_t at = r.location[i];
        to.location[i] = at;
        for (int j = 0; j < 2; ++j) {
          to.weight[i][j] = static_cast<T>(r.weight[i] * r.share[j]);
          to.place[i][j] = 0;
          if (r.weight[i] * r.share[j] == 0) continue;
          to.place[i][j] = r.channel[j] - channels.first[at - origin];
          begin = at < begin ? at : begin;
          end = at + 1 > end ? at + 1 : end;
        }
      }
      // Without weight: any location that is read.
      for (int i = 0; i < 2; ++i)
        if (r.weight[i] == 0) to.location[i] = to.location[1 - i];
    }
    if (begin > end) begin = end;
    for (MaskReads<T>& to : reads)
      for (int i = 0; i < 2; ++i)
        to.location[i] = clamp(to.location[i], begin, end > begin ? end - 1 : begin);
  }
};

// out[k] = bias + sum over c of x[k][c] * weights[c] for `COUNT` locations and 16 channels. The sum
// has several parts, because an addition has to wait for the one before it.
template <int COUNT, int PARTS, typename T>
inline void mask_products(
    const T* x, int64_t features, const T* weights, const T* bias, T* out, int64_t step) {
  typedef typename MaskLanes<T>::type Line;
  Line sums[COUNT][PARTS];
  for (int k = 0; k < COUNT; ++k)
    for (int p = 0; p < PARTS; ++p) sums[k][p] = Line{};
  int64_t c = 0;
  for (; c + PARTS <= features; c += PARTS) {
    for (int p = 0; p < PARTS; ++p) {
      Line w;
      __builtin_memcpy(&w, weights + (c + p) * MASK_LANES, sizeof w);
      for (int k = 0; k < COUNT; ++k) sums[k][p] += x[k * features + c + p] * w;
    }
  }
  for (; c < features; ++c) {
    Line w;
    __builtin_memcpy(&w, weights + c * MASK_LANES, sizeof w);
    for (int k = 0; k < COUNT; ++k) sums[k][0] += x[k * features + c] * w;
  }
  for (int k = 0; k < COUNT; ++k) {
    Line sum;
    __builtin_memcpy(&sum, bias, sizeof sum);
    for (int p = 0; p < PARTS; ++p) sum += sums[k][p];
    // The READ rows of channels are apart.
    T values[MASK_LANES];
    __builtin_memcpy(values, &sum, sizeof sum);
    for (int64_t j = 0; j < window_masks::READ; ++j)
      __builtin_memcpy(
          out + j * step + k * window_masks::READ, values + j * window_masks::READ,
          window_masks::READ * sizeof(T));
  }
}

template <typename T>
void window_masks_forward(
    const window_masks::Geometry& g, const window_masks::Channels& channels,
    const window_masks::Inputs<T>& in, const T* bias, double pad, T* out) {
  constexpr int64_t READ = window_masks::READ;
  std::vector<T> weights(g.side * g.side * g.features * MASK_LANES);
  std::vector<T> biases(g.side * g.side * MASK_LANES);
  for (int64_t v = 0; v < g.side; ++v)
    for (int64_t u = 0; u < g.side; ++u)
      for (int64_t lane = 0; lane < MASK_LANES; ++lane) {
        const int64_t row = v + lane / READ, column = u + lane % READ;
        if (row >= g.side || column >= g.side) continue;
        const T* from = in.weight + (row * g.side + column) * g.features;
        T* to = weights.data() + (v * g.side + u) * g.features * MASK_LANES + lane;
        for (int64_t c = 0; c < g.features; ++c) to[c * MASK_LANES] = from[c];
        biases[(v * g.side + u) * MASK_LANES + lane] =
            bias[row * g.side + column] - static_cast<T>(pad);
      }

  // Bands of mask rows.
  const int64_t rows = MASK_ROWS_AT_ONCE * g.zoom, bands = (g.out_side + rows - 1) / rows;
  share(in.count * bands, 1, [&](auto next) {
    MaskAxis<T> along_y, along_x;
    std::vector<T> products, line;
    next([&](int64_t task) {
      const int64_t* window = in.windows + task / bands * 3;
      const int64_t top = task % bands * rows, bottom = clamp(top + rows, 0, g.out_side);
      T* const masks = out + task / bands * g.out_side * g.out_side;
      along_y.set(g, channels, window[1] * g.steps, g.height);
      along_x.set(g, channels, window[2] * g.steps, g.width);
      const int64_t left = along_x.begin, columns = along_x.end - left;
      const int64_t width = columns * READ;
      int64_t begin = g.height, end = 0;
      if (along_y.begin < along_y.end && columns > 0)
        for (int64_t v = top; v < bottom; ++v)
          for (int i = 0; i < 2; ++i) {
            const MaskReads<T>& r = along_y.reads[v];
            if (r.weight[i][0] == 0 && r.weight[i][1] == 0) continue;
            begin = r.location[i] < begin ? r.location[i] : begin;
            end = r.location[i] + 1 > end ? r.location[i] + 1 : end;
          }
      if (begin >= end)
        return fill_row(masks + top * g.out_side, static_cast<T>(pad), (bottom - top) * g.out_side);
      products.resize((end - begin) * READ * width);
      line.resize(width);
      for (int64_t y = begin; y < end; ++y) {
        const T* x = in.x + ((window[0] * g.height + y) * g.width + left) * g.features;
        const int64_t row = channels.first[y - along_y.origin];
        T* const to = products.data() + (y - begin) * READ * width;
        int64_t i = 0;
        while (i < columns) {
          const int64_t column = channels.first[left + i - along_x.origin];
          const int64_t block = row * g.side + column;
          const T* w = weights.data() + block * g.features * MASK_LANES;
          const T* b = biases.data() + block * MASK_LANES;
          int64_t same = 1;
          while (same < 4 && i + same < columns &&
                 channels.first[left + i + same - along_x.origin] == column)
            ++same;
          const T* from = x + i * g.features;
          if (same == 4) {
            mask_products<4, 2>(from, g.features, w, b, to + i * READ, width);
          } else if (same >= 2) {
            same = 2;
            mask_products<2, 4>(from, g.features, w, b, to + i * READ, width);
          } else {
            mask_products<1, 8>(from, g.features, w, b, to + i * READ, width);
          }
          i += same;
        }
      }
      for (int64_t v = top; v < bottom; ++v) {
        const MaskReads<T>& r = along_y.reads[v];
        const T* rows_read[4];
        T shares[4];
        for (int t = 0; t < 4; ++t) {
          shares[t] = r.weight[t / 2][t % 2];
          const int64_t y = clamp(r.location[t / 2], begin, end - 1) - begin;
          rows_read[t] = products.data() + (y * READ + r.place[t / 2][t % 2]) * width;
        }
        for (int64_t i = 0; i < width; ++i)
          line[i] = shares[0] * rows_read[0][i] + shares[1] * rows_read[1][i] +
              shares[2] * rows_read[2][i] + shares[3] * rows_read[3][i];
        T* const to = masks + v * g.out_side;
        for (int64_t u = 0; u < g.out_side; ++u) {
          const MaskReads<T>& c = along_x.reads[u];
          const T* low = line.data() + (c.location[0] - left) * READ;
          const T* high = line.data() + (c.location[1] - left) * READ;
          to[u] = static_cast<T>(pad) + c.weight[0][0] * low[c.place[0][0]] +
              c.weight[0][1] * low[c.place[0][1]] + c.weight[1][0] * high[c.place[1][0]] +
              c.weight[1][1] * high[c.place[1][1]];
        }
      }
    });
  });
}

// Computes a part of the gradients: of the rows of locations of every `parts`-th band, all of
// `grad_x`; of weights and biases a part of the sum.
template <typename T>
void window_masks_backward(
    const window_masks::Geometry& g, const window_masks::Channels& channels,
    const window_masks::Inputs<T>& in, const T* grad, T* grad_x, T* grad_weight, T* grad_bias,
    int64_t part, int64_t parts) {
  constexpr int64_t READ = window_masks::READ;
  const int64_t bands = (g.height + MASK_ROWS_AT_ONCE - 1) / MASK_ROWS_AT_ONCE;
  MaskAxis<T> along_y, along_x;
  std::vector<T> products, line;
  for (int64_t band = part; band < g.num_images * bands; band += parts) {
    const int64_t image = band / bands, first = band % bands * MASK_ROWS_AT_ONCE;
    const int64_t last = clamp(first + MASK_ROWS_AT_ONCE, 0, g.height);
    for (int64_t k = 0; k < in.count; ++k) {
      const int64_t* window = in.windows + k * 3;
      if (window[0] != image) continue;
      const int64_t top = window[1] * g.steps + channels.origin;
      if (top >= last || top + int64_t(channels.first.size()) <= first) continue;
      along_y.set(g, channels, window[1] * g.steps, g.height);
      along_x.set(g, channels, window[2] * g.steps, g.width);
      const int64_t left = along_x.begin, columns = along_x.end - left;
      const int64_t width = columns * READ;
      const int64_t begin = along_y.begin > first ? along_y.begin : first;
      const int64_t end = along_y.end < last ? along_y.end : last;
      if (begin >= end || columns <= 0) continue;
      products.assign((end - begin) * READ * width, T(0));
      line.resize(width);
      const T* const masks = grad + k * g.out_side * g.out_side;
      for (int64_t v = 0; v < g.out_side; ++v) {
        const MaskReads<T>& r = along_y.reads[v];
        bool inside[2];
        for (int i = 0; i < 2; ++i)
          inside[i] = r.location[i] >= begin && r.location[i] < end &&
              (r.weight[i][0] != 0 || r.weight[i][1] != 0);
        if (!inside[0] && !inside[1]) continue;
        fill_row(line.data(), T(0), width);
        const T* from = masks + v * g.out_side;
        for (int64_t u = 0; u < g.out_side; ++u) {
          const MaskReads<T>& c = along_x.reads[u];
          for (int i = 0; i < 2; ++i) {
            T* to = line.data() + (c.location[i] - left) * READ;
            to[c.place[i][0]] += c.weight[i][0] * from[u];
            to[c.place[i][1]] += c.weight[i][1] * from[u];
          }
        }
        for (int i = 0; i < 2; ++i) {
          if (!inside[i]) continue;
          for (int j = 0; j < 2; ++j) {
            const T share = r.weight[i][j];
            if (share == 0) continue;
            T* to = products.data() + ((r.location[i] - begin) * READ + r.place[i][j]) * width;
            for (int64_t n = 0; n < width; ++n) to[n] += share * line[n];
          }
        }
      }
      for (int64_t y = begin; y < end; ++y) {
        const int64_t offset = ((image * g.height + y) * g.width + left) * g.features;
        const int64_t row = channels.first[y - along_y.origin];
        const int64_t num_rows = channels.count[y - along_y.origin];
        for (int64_t i = 0; i < columns; ++i) {
          const int64_t column = channels.first[left + i - along_x.origin];
          const int64_t num_columns = channels.count[left + i - along_x.origin];
          const T* const x = in.x + offset + i * g.features;
          T* const to = grad_x + offset + i * g.features;
          for (int64_t v = 0; v < num_rows; ++v) {
            const T* from = products.data() + ((y - begin) * READ + v) * width + i * READ;
            for (int64_t u = 0; u < num_columns; ++u) {
              const int64_t channel = (row + v) * g.side + column + u;
              const T value = from[u];
              const T* const w = in.weight + channel * g.features;
              T* const sums = grad_weight + channel * g.features;
              for (int64_t c = 0; c < g.features; ++c) to[c] += value * w[c];
              for (int64_t c = 0; c < g.features; ++c) sums[c] += value * x[c];
              grad_bias[channel] += value;
            }
          }
        }
      }
    }
  }
}
