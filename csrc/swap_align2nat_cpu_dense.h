// Part of swap_align2nat_cpu_kernels.h: the operation at all windows, forward and backward.

// ---- dense, forward ----

template <typename T>
class DenseForward {
 public:
  using A = typename Accumulate<T>::type;

  DenseForward(const Geometry& geometry, View<const T> input, T* output, double padding)
      : g(geometry), in(input), out(output), pad(static_cast<A>(padding)) {
    margin = g.side / 2 + 2;
    length = g.out_width + 2 * margin;
    // The locations of each phase, with padding on both sides; channels -1 and `side` are padding.
    phases.assign((g.side + 2) * g.lambda * length, pad);
    line.assign(g.width + 2, pad);
    if (in.x != 1) turned.assign(g.width * g.side, pad);
    for (int64_t r = 0; r < g.lambda; ++r) {
      const RowTaps taps = row_taps(r, g.lambda);
      const int64_t p = positive_modulo(r - g.shift, g.lambda);
      const int64_t back = (p - r + g.shift) / g.lambda;
      block.push_back({phase(taps.lower, p) - back - phases.data(), static_cast<A>(taps.fraction)});
    }
  }

  // Writes all mask columns of mask row `v` of the windows in row `y` of image `n`.
  void operator()(int64_t n, int64_t v, int64_t y) {
    T* target = out + ((n * g.out_side + v) * g.out_side * g.out_height + y) * g.out_width;
    RowSum<T> sum;
    rows_read(g, in, n, v, y, pad, sum);
    if (sum.count == 0) {
      for (int64_t u = 0; u < g.out_side; ++u)
        fill_row(target + u * g.out_height * g.out_width, stored<T>(pad), g.out_width);
      return;
    }
    if (g.lambda == 1 && !g.averages && in.x == 1) return shift(sum.row[0], target);
    if (in.x != 1) turn(sum);
    for (int64_t u = 0; u < g.side; ++u) sort_phases(sum, u);
    mix_columns(target);
  }

 private:
  A* phase(int64_t channel, int64_t p) {
    return phases.data() + ((channel + 1) * g.lambda + p) * length + margin;
  }

  // lambda == 1 and one tap: every output row is a part of an input row.
  void shift(const T* row, T* target) {
    for (int64_t u = 0; u < g.side; ++u) {
      T* to = target + u * g.height * g.width;
      const int64_t by = u - g.shift;  // to[x] = from[x + by]
      const int64_t begin = clamp(-by, 0, g.width), end = clamp(g.width - by, begin, g.width);
      fill_row(to, stored<T>(pad), begin);
      __builtin_memcpy(to + begin, row + u * in.c + begin + by, (end - begin) * sizeof(T));
      fill_row(to + end, stored<T>(pad), g.width - end);
    }
  }

  // Sums along the channels: for channels_last, where they are contiguous.
  void turn(const RowSum<T>& sum) {
    for (int64_t w = 0; w < g.width; ++w)
      sum_rows(turned.data() + w * g.side, sum, w * in.x, g.side, in.c);
  }

  void sort_phases(const RowSum<T>& sum, int64_t u) {
    if (g.lambda == 1 && !g.averages && in.x == 1)
      return sum_rows(phase(u, 0), sum, u * in.c, g.width, 1);
    A* row = line.data() + 1;  // row[-1] and row[width] are padding
    if (in.x == 1) {
      if (u + 1 < g.side) fetch_rows(sum, 2, 4, (u + 1) * in.c, g.width);
      sum_rows(row, sum, u * in.c, g.width, 1);
    } else {
      for (int64_t w = 0; w < g.width; ++w) row[w] = turned[w * g.side + u];
    }
    if (g.averages) {
      for (int64_t w = -1; w < g.width; ++w) row[w] = A(0.5) * (row[w] + row[w + 1]);
      phase(u, g.lambda - 1)[-1] = row[-1];  // location -1 belongs to the last phase
    }
    split_phases(row, g.width, g.lambda, phase(u, 0), length);
    row[-1] = pad;
  }

  void mix_columns(T* target) {
    const int64_t step = g.out_height * g.out_width, channel = g.lambda * length;
    for (int64_t q = 0; q < g.side; ++q) {
      for (const Column& column : block) {
        const A* low = phases.data() + column.offset + q * (channel + 1);
        const A* high = column.fraction == A(0) ? low : low + channel;
        mix_rows(target, low, high, column.fraction, g.out_width);
        target += step;
      }
    }
  }

  // A mask column of channel 0: the offset in `phases` of its lower tap for window 0.
  struct Column {
    int64_t offset;
    A fraction;
  };

  const Geometry g;
  const View<const T> in;
  T* const out;
  const A pad;
  int64_t margin, length;
  std::vector<A> phases, line, turned;
  std::vector<Column> block;
};

// The order of the rows of one image. Long output rows are written by location along H, which reads
// the input from memory only once. Short ones are written by mask row, which fills the output's
// cache lines before they leave the cache.
template <typename T>
bool by_location(const Geometry& g) {
  return g.lambda > 1 && g.out_width * int64_t(sizeof(T)) >= SHORT_ROW;
}

template <typename T>
void dense_forward(const Geometry& g, View<const T> x, T* out, double pad) {
  if (by_location<T>(g)) {
    const int64_t locations = g.lambda * (g.out_height + g.side - 1);
    share(g.num_images * locations, ROWS_AT_ONCE, [&](auto next) {
      DenseForward<T> row(g, x, out, pad);
      next([&](int64_t i) {
        const int64_t n = i / locations, r = i % locations % g.lambda, m = i % locations / g.lambda;
        const int64_t end = clamp(m + 1, 0, g.side);
        for (int64_t q = clamp(m - g.out_height + 1, 0, g.side); q < end; ++q)
          row(n, q * g.lambda + r, m - q);
      });
    });
  } else {
    share(g.num_images * g.out_side, ROWS_AT_ONCE, [&](auto next) {
      DenseForward<T> row(g, x, out, pad);
      next([&](int64_t i) {
        for (int64_t y = 0; y < g.out_height; ++y) row(i / g.out_side, i % g.out_side, y);
      });
    });
  }
}

// ---- dense, backward: each input row is gathered from the output rows that read it ----

template <typename T>
class DenseBackward {
 public:
  using A = typename Accumulate<T>::type;

  DenseBackward(const Geometry& geometry, View<const T> grad_output, T* grad_input)
      : g(geometry), grad(grad_output), out(grad_input) {
    margin = g.side / 2 + 2;
    length = g.out_width + 2 * margin;
    // Rows of gradients per mask column, zero on both sides. Mask columns of the channels -1 and
    // `side` are zero.
    columns.assign((g.side + 2) * g.lambda * length, A(0));
    line.assign(g.width + 1, A(0));
    phases.assign(g.lambda * (g.out_width + 1), A(0));
    for (int64_t p = 0; p < g.lambda; ++p) {
      const int64_t r = (p + g.shift) % g.lambda, back = (p - r + g.shift) / g.lambda;
      const RowTaps taps = row_taps(r, g.lambda);
      const A* low = column(-taps.lower, r) + back + taps.lower - 1;
      block.push_back({low - columns.data(), static_cast<A>(1 - taps.fraction),
                       static_cast<A>(taps.fraction)});
    }
  }

  // Writes all channels u and all locations along W of mask row `v` at location `h` of image `n`.
  void operator()(int64_t n, int64_t v, int64_t h) {
    T* target = out + ((n * g.side + v) * g.side * g.height + h) * g.width;
    RowSum<T> sum;
    sum.constant = A(0);
    for (int64_t k = 0; k <= int64_t(g.averages); ++k) {
      // Windows y and mask rows q * lambda + r whose location is h - k: y + q == m.
      const int64_t r = (h - k + g.shift) % g.lambda, m = (h - k + g.shift) / g.lambda;
      const RowTaps taps = row_taps(r, g.lambda);
      for (int64_t j = 0; j < 2; ++j) {
        const int64_t q = v - taps.lower - j, y = m - q;
        const double weight =
            (j ? taps.fraction : 1 - taps.fraction) * (g.averages ? 0.5 : 1.0);
        // A location before the input (h - k + shift < 0, only if shift == 0) has no window.
        if (h - k + g.shift < 0 || q < 0 || q >= g.side || y < 0 || y >= g.out_height) continue;
        if (weight == 0) continue;
        const int64_t row = q * g.lambda + r;
        sum.add(grad.data + n * grad.n + row * g.out_side * grad.c + y * grad.y, weight);
      }
    }
    if (sum.count == 0) {
      for (int64_t u = 0; u < g.side; ++u)
        fill_row(target + u * g.height * g.width, stored<T>(A(0)), g.width);
      return;
    }
    if (g.lambda == 1 && !g.averages && grad.x == 1) return shift(sum.row[0], target);
    gather(sum);
    for (int64_t u = 0; u < g.side; ++u) {
      mix_channel(u);
      T* to = target + u * g.height * g.width;
      const A* from = line.data() + 1;
      if (g.averages) {
        for (int64_t w = 0; w < g.width; ++w) store(to + w, A(0.5) * (from[w] + from[w - 1]));
      } else {
        for (int64_t w = 0; w < g.width; ++w) store(to + w, from[w]);
      }
    }
  }

 private:
  A* column(int64_t channel, int64_t r) {
    return columns.data() + ((channel + 1) * g.lambda + r) * length + margin;
  }

  void shift(const T* row, T* target) {
    for (int64_t u = 0; u < g.side; ++u) {
      T* to = target + u * g.height * g.width;
      const int64_t by = g.shift - u;  // to[w] = from[w + by]
      const int64_t begin = clamp(-by, 0, g.width), end = clamp(g.width - by, begin, g.width);
      fill_row(to, stored<T>(A(0)), begin);
      __builtin_memcpy(to + begin, row + u * grad.c + begin + by, (end - begin) * sizeof(T));
      fill_row(to + end, stored<T>(A(0)), g.width - end);
    }
  }

  void gather(const RowSum<T>& sum) {
    if (grad.x == 1 || grad.c != 1) {
      for (int64_t u = 0; u < g.out_side; ++u) {
        if (u + 2 < g.out_side) fetch_rows(sum, 0, 2, (u + 2) * grad.c, g.out_width);
        sum_rows(column(0, u), sum, u * grad.c, g.out_width, grad.x);
      }
      return;
    }
    for (int64_t x = 0; x < g.out_width; ++x) {  // channels_last: along the channels
      turned.resize(g.out_side);
      sum_rows(turned.data(), sum, x * grad.x, g.out_side, 1);
      for (int64_t u = 0; u < g.out_side; ++u) column(0, u)[x] = turned[u];
    }
  }

  // line[1 + w] = the gradient of channel u from values whose floor is w, -1 <= w < width.
  void mix_channel(int64_t u) {
    const int64_t channel = g.lambda * length;
    A* to = g.lambda == 1 ? line.data() : phases.data();  // with location -1 of each phase
    for (const Column& column : block) {
      const A* low = columns.data() + column.offset + u * (channel - 1);
      const A* high = low - channel + 1;
      add_rows(to, low, column.low, high, column.high, g.out_width + 1);
      to += g.out_width + 1;
    }
    if (g.lambda > 1)
      merge_phases(phases.data() + 1, g.out_width + 1, g.lambda, line.data() + 1, g.width);
  }

  // A phase, for channel 0 and location -1 of this phase: the offset of the lower tap in `columns`,
  // its weight, and the weight of the channel before, one window further.
  struct Column {
    int64_t offset;
    A low, high;
  };

  const Geometry g;
  const View<const T> grad;
  T* const out;
  int64_t margin, length;
  std::vector<A> columns, line, phases, turned;
  std::vector<Column> block;
};

template <typename T>
void dense_backward(const Geometry& g, View<const T> grad, T* out) {
  if (by_location<T>(g)) {
    share(g.num_images * g.height, ROWS_AT_ONCE, [&](auto next) {
      DenseBackward<T> row(g, grad, out);
      next([&](int64_t i) {
        for (int64_t v = 0; v < g.side; ++v) row(i / g.height, v, i % g.height);
      });
    });
  } else {
    // By the remainder of the location, so that only a few mask rows of the output are read.
    const int64_t rows = g.side * g.lambda;
    share(g.num_images * rows, ROWS_AT_ONCE, [&](auto next) {
      DenseBackward<T> row(g, grad, out);
      next([&](int64_t i) {
        const int64_t n = i / rows, v = i % rows / g.lambda, r = i % g.lambda;
        for (int64_t h = positive_modulo(r - g.shift, g.lambda); h < g.height; h += g.lambda)
          row(n, v, h);
      });
    });
  }
}
