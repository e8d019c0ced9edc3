// The CPU kernels, written once and compiled for several instruction sets: swap_align2nat_cpu.cpp
// includes this file in one namespace for each of them, which is why it has no include guard and
// includes nothing.
//
// Every kernel goes through the two axis pairs one after the other. The first pass combines at
// most four rows of memory, which are contiguous, into a buffer that stays in the cache; the
// second pass works in that buffer, where places are sorted by their remainder modulo lambda
// ("phases"), so that the steps of lambda places become steps of one.

template <typename T>
struct Accumulate {
  using type = T;
};
template <>
struct Accumulate<Half> {
  using type = float;
};
template <>
struct Accumulate<BFloat16> {
  using type = float;
};

inline uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// Conversions without branches, so that the loops around them become vector code.

inline float load(float value) { return value; }
inline double load(double value) { return value; }
inline float load(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

inline float load(Half value) {
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fff) << 13;
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  const uint32_t rebiased = magnitude + (112u << 23);
  // Below the smallest normal half, the place of the point is fixed by a subtraction.
  const uint32_t tiny = bits_of(float_of(rebiased + (1u << 23)) - float_of(113u << 23));
  const uint32_t special = rebiased + (112u << 23);  // infinite or not a number
  const uint32_t result =
      magnitude >= (31u << 23) ? special : (magnitude < (1u << 23) ? tiny : rebiased);
  return float_of(result | sign);
}

inline void store(float* at, float value) { *at = value; }
inline void store(double* at, double value) { *at = value; }

inline void store(BFloat16* at, float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  const uint32_t result = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;
  at->bits = static_cast<uint16_t>(result);
}

inline void store(Half* at, float value) {
  const uint32_t bits = bits_of(value) & 0x7fffffff;
  const uint32_t sign = (bits_of(value) >> 16) & 0x8000;
  // To nearest, ties to even: by the adder for results below the smallest normal half, by hand
  // above it.
  const uint32_t tiny = bits_of(float_of(bits) + float_of(126u << 23)) - (126u << 23);
  const uint32_t normal = (bits - (112u << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
  const uint32_t special = bits > 0x7f800000 ? 0x7e00 : 0x7c00;
  const uint32_t result =
      bits >= (143u << 23) ? special : (bits < (113u << 23) ? tiny : normal);
  at->bits = static_cast<uint16_t>(result | sign);
}

template <typename T, typename A>
inline T stored(A value) {
  T result;
  store(&result, value);
  return result;
}

// ---- rows ----

// At most four rows of memory with their weights, and what their weights lack to 1 times the
// padding.
template <typename T>
struct RowSum {
  using A = typename Accumulate<T>::type;
  const T* row[4];
  A weight[4];
  A constant;
  int count = 0;

  void add(const T* pointer, double value) {
    row[count] = pointer;
    weight[count++] = static_cast<A>(value);
  }
};

template <int COUNT, typename T, typename A>
inline void sum_rows(A* out, const RowSum<T>& sum, int64_t offset, int64_t size) {
  const T* a = sum.row[0] + offset;
  const T* b = sum.row[COUNT > 1 ? 1 : 0] + offset;
  const T* c = sum.row[COUNT > 2 ? 2 : 0] + offset;
  const T* d = sum.row[COUNT > 3 ? 3 : 0] + offset;
  const A wa = sum.weight[0], wb = sum.weight[1], wc = sum.weight[2], wd = sum.weight[3];
  const A constant = sum.constant;
  for (int64_t i = 0; i < size; ++i) {
    A value = constant + wa * load(a[i]);
    if (COUNT > 1) value += wb * load(b[i]);
    if (COUNT > 2) value += wc * load(c[i]);
    if (COUNT > 3) value += wd * load(d[i]);
    out[i] = value;
  }
}

#if defined(TENSORMASK_AVX512)
// Rows are short where lambda is large: a masked step is cheaper than a loop for the rest.
inline __mmask16 lanes(int64_t left) { return left >= 16 ? 0xffff : (1u << left) - 1; }

template <int COUNT>
inline void sum_rows(float* out, const RowSum<float>& sum, int64_t offset, int64_t size) {
  for (int64_t i = 0; i < size; i += 16) {
    const __mmask16 mask = lanes(size - i);
    __m512 value = _mm512_set1_ps(sum.constant);
    for (int k = 0; k < COUNT; ++k) {
      const __m512 row = _mm512_maskz_loadu_ps(mask, sum.row[k] + offset + i);
      value = _mm512_fmadd_ps(_mm512_set1_ps(sum.weight[k]), row, value);
    }
    _mm512_mask_storeu_ps(out + i, mask, value);
  }
}
#endif

// out[i] = the sum at `offset + i * step`.
template <typename T, typename A>
inline void sum_rows(A* out, const RowSum<T>& sum, int64_t offset, int64_t size, int64_t step) {
  if (step == 1) {
    switch (sum.count) {
      case 1: return sum_rows<1>(out, sum, offset, size);
      case 2: return sum_rows<2>(out, sum, offset, size);
      case 3: return sum_rows<3>(out, sum, offset, size);
      default: return sum_rows<4>(out, sum, offset, size);
    }
  }
  for (int64_t i = 0; i < size; ++i) {
    A value = sum.constant;
    for (int k = 0; k < sum.count; ++k) value += sum.weight[k] * load(sum.row[k][offset + i * step]);
    out[i] = value;
  }
}

// Asks for the rows that come next: hardware does not see them coming, a channel is far away.
template <typename T>
inline void fetch_rows(const RowSum<T>& sum, int first, int last, int64_t offset, int64_t size) {
  for (int k = first; k < last && k < sum.count; ++k)
    for (int64_t i = 0; i < size; i += int64_t(64 / sizeof(T)))
      __builtin_prefetch(sum.row[k] + offset + i);
}

// out = low + fraction * (high - low): exactly the padding where both are.
template <typename T, typename A>
inline void mix_rows(T* out, const A* low, const A* high, A fraction, int64_t size) {
  if (fraction == A(0)) {
    for (int64_t i = 0; i < size; ++i) store(out + i, low[i]);
  } else {
    for (int64_t i = 0; i < size; ++i) store(out + i, low[i] + fraction * (high[i] - low[i]));
  }
}

#if defined(TENSORMASK_AVX512)
inline void mix_rows(float* out, const float* low, const float* high, float fraction, int64_t size) {
  const __m512 f = _mm512_set1_ps(fraction);
  for (int64_t i = 0; i < size; i += 16) {
    const __mmask16 mask = lanes(size - i);
    const __m512 a = _mm512_maskz_loadu_ps(mask, low + i), b = _mm512_maskz_loadu_ps(mask, high + i);
    _mm512_mask_storeu_ps(out + i, mask, _mm512_fmadd_ps(f, _mm512_sub_ps(b, a), a));
  }
}
#endif

template <typename A>
inline void add_rows(A* out, const A* a, A wa, const A* b, A wb, int64_t size) {
  for (int64_t i = 0; i < size; ++i) out[i] = wa * a[i] + wb * b[i];
}

#if defined(TENSORMASK_AVX512)
inline void add_rows(float* out, const float* a, float wa, const float* b, float wb, int64_t size) {
  for (int64_t i = 0; i < size; i += 16) {
    const __mmask16 mask = lanes(size - i);
    const __m512 value = _mm512_mul_ps(_mm512_set1_ps(wb), _mm512_maskz_loadu_ps(mask, b + i));
    _mm512_mask_storeu_ps(
        out + i, mask,
        _mm512_fmadd_ps(_mm512_set1_ps(wa), _mm512_maskz_loadu_ps(mask, a + i), value));
  }
}
#endif

template <typename T>
inline void fill_row(T* out, T value, int64_t size) {
  for (int64_t i = 0; i < size; ++i) out[i] = value;
}

// ---- phases: from[j * lambda + p] <-> to[p * length + j] ----

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define TENSORMASK_TRANSPOSE
#endif
#endif

#if defined(TENSORMASK_TRANSPOSE)
template <typename A>
inline void transpose_8x8(const A* from, int64_t from_step, A* to, int64_t to_step) {
  typedef A Eight __attribute__((vector_size(8 * sizeof(A))));
  Eight a[8], b[8];
  for (int i = 0; i < 8; ++i) __builtin_memcpy(&a[i], from + i * from_step, sizeof a[i]);
  for (int i = 0; i < 8; i += 2) {
    b[i] = __builtin_shufflevector(a[i], a[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
    b[i + 1] = __builtin_shufflevector(a[i], a[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  }
  for (int k = 0; k < 8; k += 4)
    for (int i = k; i < k + 2; ++i) {
      a[i] = __builtin_shufflevector(b[i], b[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      a[i + 2] = __builtin_shufflevector(b[i], b[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int i = 0; i < 4; ++i) {
    b[i] = __builtin_shufflevector(a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    b[i + 4] = __builtin_shufflevector(a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
  for (int i = 0; i < 8; ++i) __builtin_memcpy(to + i * to_step, &b[i], sizeof b[i]);
}
#endif

template <int LAMBDA, typename A>
inline void split_small(const A* from, A* to, int64_t length, int64_t count) {
  for (int64_t j = 0; j < count; ++j)
    for (int p = 0; p < LAMBDA; ++p) to[p * length + j] = from[j * LAMBDA + p];
}

template <int LAMBDA, typename A>
inline void merge_small(const A* from, int64_t length, A* to, int64_t count) {
  for (int64_t j = 0; j < count; ++j)
    for (int p = 0; p < LAMBDA; ++p) to[j * LAMBDA + p] = from[p * length + j];
}

// Sorts `size` places by their remainder modulo lambda.
template <typename A>
inline void split_phases(const A* from, int64_t size, int64_t lambda, A* to, int64_t length) {
  int64_t j = 0;
  const int64_t whole = size / lambda;
  if (lambda == 2) {
    split_small<2>(from, to, length, j = whole);
  } else if (lambda == 4) {
    split_small<4>(from, to, length, j = whole);
  }
#if defined(TENSORMASK_TRANSPOSE)
  else if (lambda % 8 == 0) {
    for (; j + 8 <= whole; j += 8)
      for (int64_t p = 0; p < lambda; p += 8)
        transpose_8x8(from + j * lambda + p, lambda, to + p * length + j, length);
  }
#endif
  from += j * lambda;
  for (int64_t p = 0; p < lambda; ++p) {
    const int64_t end = (size - p + lambda - 1) / lambda - j;
    for (int64_t i = 0; i < end; ++i) to[p * length + j + i] = from[i * lambda + p];
  }
}

// The other way round, for the places -1 .. size - 1: `from` has a column before the first, whose
// last phase is the place -1.
template <typename A>
inline void merge_phases(const A* from, int64_t length, int64_t lambda, A* to, int64_t size) {
  int64_t j = 0;
  const int64_t whole = size / lambda;
  to[-1] = from[(lambda - 1) * length - 1];
  if (lambda == 2) {
    merge_small<2>(from, length, to, j = whole);
  } else if (lambda == 4) {
    merge_small<4>(from, length, to, j = whole);
  }
#if defined(TENSORMASK_TRANSPOSE)
  else if (lambda % 8 == 0) {
    for (; j + 8 <= whole; j += 8)
      for (int64_t p = 0; p < lambda; p += 8)
        transpose_8x8(from + p * length + j, length, to + j * lambda + p, lambda);
  }
#endif
  to += j * lambda;
  for (int64_t p = 0; p < lambda; ++p) {
    const int64_t end = (size - p + lambda - 1) / lambda - j;
    for (int64_t i = 0; i < end; ++i) to[i * lambda + p] = from[p * length + j + i];
  }
}

// ---- dense, forward ----

template <typename T>
class DenseForward {
 public:
  using A = typename Accumulate<T>::type;

  DenseForward(const Geometry& geometry, View<const T> input, T* output, double padding)
      : g(geometry), in(input), out(output), pad(static_cast<A>(padding)) {
    margin = g.side / 2 + 2;
    length = g.out_width + 2 * margin;
    // A phase's places, with padding on both sides; channels -1 and `side` are padding.
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

  // All mask columns of mask row `v` of the windows in row `y` of image `n`.
  void operator()(int64_t n, int64_t v, int64_t y) {
    T* target = out + ((n * g.out_side + v) * g.out_side * g.out_height + y) * g.out_width;
    RowSum<T> sum;
    double missing = 1;
    const int64_t place = y * g.lambda + v - g.shift;
    const RowTaps taps = row_taps(v % g.lambda, g.lambda);
    for (int64_t k = 0; k <= int64_t(g.averages); ++k) {
      if (place + k < 0 || place + k >= g.height) continue;
      for (int64_t j = 0; j < 2; ++j) {
        const int64_t channel = v / g.lambda + taps.lower + j;
        const double weight =
            (j ? taps.fraction : 1 - taps.fraction) * (g.averages ? 0.5 : 1.0);
        if (channel < 0 || channel >= g.side || weight == 0) continue;
        sum.add(in.data + n * in.n + channel * g.side * in.c + (place + k) * in.y, weight);
        missing -= weight;
      }
    }
    if (sum.count == 0) {
      for (int64_t u = 0; u < g.out_side; ++u)
        fill_row(target + u * g.out_height * g.out_width, stored<T>(pad), g.out_width);
      return;
    }
    sum.constant = static_cast<A>(missing) * pad;
    if (g.lambda == 1 && !g.averages && in.x == 1) return shift(sum.row[0], target);
    if (in.x != 1) turn(sum);
    for (int64_t u = 0; u < g.side; ++u) sort_phases(sum, u);
    mix_columns(target);
  }

 private:
  A* phase(int64_t channel, int64_t p) {
    return phases.data() + ((channel + 1) * g.lambda + p) * length + margin;
  }

  // lambda == 1 and one tap: every output row is a piece of an input row.
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

  // The sums of all channels, read along them: for channels_last, where they lie together.
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
      phase(u, g.lambda - 1)[-1] = row[-1];  // the place -1 belongs to the last phase
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

  // A mask column of channel 0: where its lower tap for window 0 lies in `phases`.
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

// The order of the rows of one image: by place along H while output rows are long, which reads
// the input once, from memory to cache; by mask row when they are short, so that the output's
// cache lines are filled before they leave the cache.
template <typename T>
bool by_place(const Geometry& g) {
  return g.lambda > 1 && g.out_width * int64_t(sizeof(T)) >= SHORT_ROW;
}

template <typename T>
void dense_forward(const Geometry& g, View<const T> x, T* out, double pad) {
  if (by_place<T>(g)) {
    const int64_t places = g.lambda * (g.out_height + g.side - 1);
    share(g.num_images * places, ROWS_AT_ONCE, [&](auto next) {
      DenseForward<T> row(g, x, out, pad);
      next([&](int64_t i) {
        const int64_t n = i / places, r = i % places % g.lambda, m = i % places / g.lambda;
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

// ---- dense, backward: the transposed map, each input row gathered from the outputs it went to ----

template <typename T>
class DenseBackward {
 public:
  using A = typename Accumulate<T>::type;

  DenseBackward(const Geometry& geometry, View<const T> grad_output, T* grad_input)
      : g(geometry), grad(grad_output), out(grad_input) {
    margin = g.side / 2 + 2;
    length = g.out_width + 2 * margin;
    // Rows of gradients per mask column, zero on both sides; mask columns of the channels -1 and
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

  // All channels u and all places along W of the mask row `v` and the place `h` of image `n`.
  void operator()(int64_t n, int64_t v, int64_t h) {
    T* target = out + ((n * g.side + v) * g.side * g.height + h) * g.width;
    RowSum<T> sum;
    sum.constant = A(0);
    for (int64_t k = 0; k <= int64_t(g.averages); ++k) {
      // Windows y and mask rows q * lambda + r whose place is h - k: y + q == m.
      const int64_t r = (h - k + g.shift) % g.lambda, m = (h - k + g.shift) / g.lambda;
      const RowTaps taps = row_taps(r, g.lambda);
      for (int64_t j = 0; j < 2; ++j) {
        const int64_t q = v - taps.lower - j, y = m - q;
        const double weight =
            (j ? taps.fraction : 1 - taps.fraction) * (g.averages ? 0.5 : 1.0);
        // A place before the map (h - k + shift < 0 only where shift == 0) has no window.
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

  // line[1 + w] = what arrives in channel u by the floor of the place w, -1 <= w < width.
  void mix_channel(int64_t u) {
    const int64_t channel = g.lambda * length;
    A* to = g.lambda == 1 ? line.data() : phases.data();  // with a place -1 of each phase
    for (const Column& column : block) {
      const A* low = columns.data() + column.offset + u * (channel - 1);
      const A* high = low - channel + 1;
      add_rows(to, low, column.low, high, column.high, g.out_width + 1);
      to += g.out_width + 1;
    }
    if (g.lambda > 1)
      merge_phases(phases.data() + 1, g.out_width + 1, g.lambda, line.data() + 1, g.width);
  }

  // A phase: for channel 0 and the place -1 of this phase, where the lower tap lies in `columns`;
  // its weight and that of the channel before, one window further.
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
  if (by_place<T>(g)) {
    share(g.num_images * g.height, ROWS_AT_ONCE, [&](auto next) {
      DenseBackward<T> row(g, grad, out);
      next([&](int64_t i) {
        for (int64_t v = 0; v < g.side; ++v) row(i / g.height, v, i % g.height);
      });
    });
  } else {
    // By the remainder of the place, so that what is read of the output is a few mask rows.
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

// ---- at windows ----

// What one channel gives to the 2 * lambda mask rows (or columns) that read it. They begin at
// (channel - 1) * lambda + `middle`: first those that lie before the channel, then those after it.
template <typename A>
struct ChannelWeights {
  int64_t middle = 0;
  std::vector<A> weight;     // of the channel, per mask row that reads it
  std::vector<A> fraction;   // of the channel after, for the lambda mask rows after a channel

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

// One mask row of one window.
template <typename T>
class WindowForward {
 public:
  using A = typename Accumulate<T>::type;

  WindowForward(const Geometry& geometry, View<const T> input, double padding)
      : g(geometry), in(input), pad(static_cast<A>(padding)), channel(geometry.lambda) {
    length = 2 * g.lambda + 1;
    places.assign(3 * length, pad);  // of two channels in turn, and padding
  }

  void operator()(int64_t n, int64_t y, int64_t x, int64_t v, T* target) {
    RowSum<T> sum;
    const A missing = find_rows(sum, n, y, v);
    if (sum.count == 0) return fill_row(target, stored<T>(pad), g.out_side);
    sum.constant = missing * pad;
    const int64_t origin = x * g.lambda - g.shift;  // the place of mask column 0
    if (g.lambda == 1) return read_diagonal(sum, origin, target);

    const A* const padding = places.data() + 2 * length;
    const A* low = padding;
    for (int64_t q = -1; q < g.side; ++q) {
      const A* high = padding;
      if (q + 1 < g.side) high = read_channel(sum, q + 1, origin, (q + 1) % 2);
      mix(q, low + g.lambda, high, target);
      low = high;
    }
  }

 private:
  // Adds the rows that a mask row reads; what their weights lack to 1.
  A find_rows(RowSum<T>& sum, int64_t n, int64_t y, int64_t v) const {
    double missing = 1;
    const int64_t place = y * g.lambda + v - g.shift;
    const RowTaps taps = row_taps(v % g.lambda, g.lambda);
    for (int64_t k = 0; k <= int64_t(g.averages); ++k) {
      for (int64_t j = 0; j < 2; ++j) {
        const int64_t row = v / g.lambda + taps.lower + j;
        const double weight = (j ? taps.fraction : 1 - taps.fraction) * (g.averages ? 0.5 : 1.0);
        if (place + k < 0 || place + k >= g.height || row < 0 || row >= g.side) continue;
        if (weight == 0) continue;
        sum.add(in.data + n * in.n + row * g.side * in.c + (place + k) * in.y, weight);
        missing -= weight;
      }
    }
    return static_cast<A>(missing);
  }

  // lambda == 1: each mask column reads a channel of its own.
  void read_diagonal(const RowSum<T>& sum, int64_t origin, T* target) const {
    for (int64_t u = 0; u < g.side; ++u) {
      A value = read_place(sum, u, origin + u);
      if (g.averages) value = A(0.5) * (value + read_place(sum, u, origin + u + 1));
      store(target + u, value);
    }
  }

  A read_place(const RowSum<T>& sum, int64_t u, int64_t w) const {
    if (w < 0 || w >= g.width) return pad;
    A value = sum.constant;
    for (int k = 0; k < sum.count; ++k)
      value += sum.weight[k] * load(sum.row[k][u * in.c + w * in.x]);
    return value;
  }

  // The places of channel `u` for the mask columns that read it.
  const A* read_channel(const RowSum<T>& sum, int64_t u, int64_t origin, int64_t slot) {
    A* buffer = places.data() + slot * length;
    const int64_t first = origin + (u - 1) * g.lambda + channel.middle;
    const int64_t size = 2 * g.lambda + int64_t(g.averages);
    const int64_t begin = clamp(-first, 0, size), end = clamp(g.width - first, begin, size);
    fill_row(buffer, pad, begin);
    // The mask rows to come read the places below, a cache line or two in each channel.
    fetch_rows(sum, 0, 4, 2 * in.y + u * in.c + (first + begin) * in.x, end - begin);
    sum_rows(buffer + begin, sum, u * in.c + (first + begin) * in.x, end - begin, in.x);
    fill_row(buffer + end, pad, size - end);
    if (g.averages)
      for (int64_t i = 0; i < 2 * g.lambda; ++i) buffer[i] = A(0.5) * (buffer[i] + buffer[i + 1]);
    return buffer;
  }

  // The mask columns between the channels q and q + 1.
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
  std::vector<A> places;
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

// One channel of one image: all that arrives there, window after window.
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
      int64_t v, int64_t u, const int64_t* windows, const int64_t* first, const int64_t* last, T* out) {
    // Half types are summed in float.
    A* sums = sizeof(T) == sizeof(A) ? reinterpret_cast<A*>(out) : plane.data();
    fill_row(sums, A(0), g.height * g.width);
    for (const int64_t* k = first; k < last; ++k)
      add_window(grad.data + *k * grad.n, windows[*k * 3 + 1], windows[*k * 3 + 2], v, u, sums);
    if (sizeof(T) != sizeof(A))
      for (int64_t i = 0; i < g.height * g.width; ++i) store(out + i, sums[i]);
  }

 private:
  // `grad`'s (y, x) are mask rows and columns, its n is the window.
  void add_window(const T* masks, int64_t y, int64_t x, int64_t v, int64_t u, A* sums) {
    // Mask rows and columns that read this channel, and their places.
    const int64_t row = (v - 1) * g.lambda + channel.middle;
    const int64_t row_begin = clamp(row, 0, g.out_side);
    const int64_t row_end = clamp(row + 2 * g.lambda, 0, g.out_side);
    const int64_t column = (u - 1) * g.lambda + channel.middle;
    const int64_t column_begin = clamp(column, 0, g.out_side);
    const int64_t size = clamp(column + 2 * g.lambda, 0, g.out_side) - column_begin;
    const int64_t to_row = g.shift - y * g.lambda;  // mask row = place + to_row
    const int64_t place = column_begin - g.shift + x * g.lambda;
    const int64_t extra = int64_t(g.averages);
    const int64_t begin = clamp(-place, 0, size + extra);
    const int64_t end = clamp(g.width - place, begin, size + extra);
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
      A* to = sums + h * g.width + place;
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

// `order` holds the numbers of the windows, image after image, and `starts` where each begins.
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
