// Part of swap_align2nat_cpu_kernels.h: the operation at chosen windows, forward and backward.

// The weights of one channel for the 2 * lambda mask rows (or columns) that read it. These begin at
// (channel - 1) * lambda + `middle`: first those before the channel, then those after it.
template <typename A>
struct ChannelWeights {
  int64_t middle = 0;
  std::vector<A> weight;    // of the channel, per mask row that reads it
  std::vector<A> fraction;  // of the next channel, for the lambda mask rows after a channel

  explicit ChannelWeights(int64_t lambda) : weight(2 * lambda), fraction(lambda) {
    while (row_taps(middle, lambda).lower < 0) ++middle;
    for (int64_t i = 0; i < lambda; ++i) {
      const double high = row_taps((middle + i) % lambda, lambda).fraction;
      fraction[i] = static_cast<A>(high);
      weight[i] = static_cast<A>(high);
      weight[lambda + i] = static_cast<A>(1 - high);
    }
  }
};

// Computes one mask row of one window.
template <typename T>
class WindowForward {
 public:
  using A = typename Accumulate<T>::type;

  WindowForward(const Geometry& geometry, View<const T> input, double padding)
      : g(geometry), in(input), pad(static_cast<A>(padding)), channel(geometry.lambda) {
    length = 2 * g.lambda + 1;
    locations.assign(3 * length, pad);  // of two channels alternately, and padding
  }

  void operator()(int64_t n, int64_t y, int64_t x, int64_t v, T* target) {
    RowSum<T> sum;
    rows_read(g, in, n, v, y, pad, sum);
    if (sum.count == 0) return fill_row(target, stored<T>(pad), g.out_side);
    const int64_t origin = x * g.lambda - g.shift;  // the location of mask column 0
    if (g.lambda == 1) return read_diagonal(sum, origin, target);

    const A* const padding = locations.data() + 2 * length;
    const A* low = padding;
    for (int64_t q = -1; q < g.side; ++q) {
      const A* high = padding;
      if (q + 1 < g.side) high = read_channel(sum, q + 1, origin, (q + 1) % 2);
      mix(q, low + g.lambda, high, target);
      low = high;
    }
  }

 private:
  // lambda == 1: each mask column reads a channel of its own.
  void read_diagonal(const RowSum<T>& sum, int64_t origin, T* target) const {
    for (int64_t u = 0; u < g.side; ++u) {
      A value = read_location(sum, u, origin + u);
      if (g.averages) value = A(0.5) * (value + read_location(sum, u, origin + u + 1));
      store(target + u, value);
    }
  }

  A read_location(const RowSum<T>& sum, int64_t u, int64_t w) const {
    if (w < 0 || w >= g.width) return pad;
    A value = sum.constant;
    for (int k = 0; k < sum.count; ++k)
      value += sum.weight[k] * load(sum.row[k][u * in.c + w * in.x]);
    return value;
  }

  // Returns the locations of channel `u` for the mask columns that read it.
  const A* read_channel(const RowSum<T>& sum, int64_t u, int64_t origin, int64_t slot) {
    A* buffer = locations.data() + slot * length;
    const int64_t first = origin + (u - 1) * g.lambda + channel.middle;
    const int64_t size = 2 * g.lambda + int64_t(g.averages);
    const int64_t begin = clamp(-first, 0, size), end = clamp(g.width - first, begin, size);
    fill_row(buffer, pad, begin);
    // The next mask rows read the locations below: one or two cache lines of each channel.
    fetch_rows(sum, 0, 4, 2 * in.y + u * in.c + (first + begin) * in.x, end - begin);
    sum_rows(buffer + begin, sum, u * in.c + (first + begin) * in.x, end - begin, in.x);
    fill_row(buffer + end, pad, size - end);
    if (g.averages)
      for (int64_t i = 0; i < 2 * g.lambda; ++i) buffer[i] = A(0.5) * (buffer[i] + buffer[i + 1]);
    return buffer;
  }

  // Writes the mask columns between the channels q and q + 1.
  void mix(int64_t q, const A* low, const A* high, T* target) const {
    const int64_t origin = q * g.lambda + channel.middle;
    const int64_t begin = clamp(-origin, 0, g.lambda);
    const int64_t end = clamp(g.out_side - origin, begin, g.lambda);
    for (int64_t i = begin; i < end; ++i)
      store(target + origin + i, low[i] + channel.fraction[i] * (high[i] - low[i]));
  }

  const Geometry g;
  const View<const T> in;
  const A pad;
  const ChannelWeights<A> channel;
  int64_t length;
  std::vector<A> locations;
};

template <typename T>
void windows_forward(
    const Geometry& g, View<const T> x, const int64_t* windows, int64_t count, T* out, double pad) {
  share(count * g.out_side, g.lambda < ROWS_AT_ONCE ? ROWS_AT_ONCE : g.lambda, [&](auto next) {
    WindowForward<T> row(g, x, pad);
    next([&](int64_t i) {
      const int64_t* window = windows + i / g.out_side * 3;
      row(window[0], window[1], window[2], i % g.out_side, out + i * g.out_side);
    });
  });
}

// Sums the gradients of one channel of one image, window after window.
template <typename T>
class WindowBackward {
 public:
  using A = typename Accumulate<T>::type;

  WindowBackward(const Geometry& geometry, View<const T> grad_masks)
      : g(geometry), grad(grad_masks), channel(geometry.lambda) {
    line.assign(2 * g.lambda + 2, A(0));
    if (sizeof(T) != sizeof(A)) plane.resize(g.height * g.width);
  }

  void operator()(
      int64_t v, int64_t u, const int64_t* windows, const int64_t* first, const int64_t* last,
      T* out) {
    // Half types are summed in float.
    A* sums = sizeof(T) == sizeof(A) ? reinterpret_cast<A*>(out) : plane.data();
    fill_row(sums, A(0), g.height * g.width);
    for (const int64_t* k = first; k < last; ++k)
      add_window(grad.data + *k * grad.n, windows[*k * 3 + 1], windows[*k * 3 + 2], v, u, sums);
    if (sizeof(T) != sizeof(A))
      for (int64_t i = 0; i < g.height * g.width; ++i) store(out + i, sums[i]);
  }

 private:
  // The steps y, x and n of `grad` are those of mask rows, mask columns and windows.
  void add_window(const T* masks, int64_t y, int64_t x, int64_t v, int64_t u, A* sums) {
    // Mask rows and columns that read this channel, and their locations.
    const int64_t row = (v - 1) * g.lambda + channel.middle;
    const int64_t row_begin = clamp(row, 0, g.out_side);
    const int64_t row_end = clamp(row + 2 * g.lambda, 0, g.out_side);
    const int64_t column = (u - 1) * g.lambda + channel.middle;
    const int64_t column_begin = clamp(column, 0, g.out_side);
    const int64_t size = clamp(column + 2 * g.lambda, 0, g.out_side) - column_begin;
    const int64_t to_row = g.shift - y * g.lambda;  // mask row = location + to_row
    const int64_t location = column_begin - g.shift + x * g.lambda;
    const int64_t extra = int64_t(g.averages);
    const int64_t begin = clamp(-location, 0, size + extra);
    const int64_t end = clamp(g.width - location, begin, size + extra);
    if (begin == end) return;

    const int64_t h_end = clamp(row_end - to_row + extra, 0, g.height);
    for (int64_t h = clamp(row_begin - to_row, 0, g.height); h < h_end; ++h) {
      RowSum<T> sum;
      sum.constant = A(0);
      for (int64_t k = 0; k <= extra; ++k) {
        const int64_t i = h - k + to_row;
        if (i < row_begin || i >= row_end) continue;
        sum.add(masks + i * grad.y, channel.weight[i - row] * (g.averages ? 0.25 : 1.0));
      }
      if (sum.count == 0) continue;
      A* values = line.data() + 1;
      sum_rows(values, sum, column_begin * grad.x, size, grad.x);
      const A* weight = channel.weight.data() + column_begin - column;
      for (int64_t i = 0; i < size; ++i) values[i] *= weight[i];
      A* to = sums + h * g.width + location;
      if (g.averages) {
        values[size] = A(0);
        for (int64_t i = begin; i < end; ++i) to[i] += values[i] + values[i - 1];
      } else {
        for (int64_t i = begin; i < end; ++i) to[i] += values[i];
      }
    }
  }

  const Geometry g;
  const View<const T> grad;
  const ChannelWeights<A> channel;
  std::vector<A> line, plane;
};

// `order` holds the indices of the windows, sorted by image; `starts` is where each image begins.
template <typename T>
void windows_backward(
    const Geometry& g, View<const T> grad, const int64_t* windows, const int64_t* order,
    const int64_t* starts, T* out) {
  const int64_t channels = g.side * g.side;
  share(g.num_images * channels, 1, [&](auto next) {
    WindowBackward<T> plane(g, grad);
    next([&](int64_t i) {
      const int64_t n = i / channels, c = i % channels;
      plane(c / g.side, c % g.side, windows, order + starts[n], order + starts[n + 1],
            out + i * g.height * g.width);
    });
  });
}
