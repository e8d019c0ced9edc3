// Part of swap_align2nat_cpu_kernels.h: threads, number formats, rows of memory, and phases.

inline int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : (value > high ? high : value);
}

inline int64_t positive_modulo(int64_t value, int64_t by) { return (value % by + by) % by; }

// Runs `work(next)` once per thread, where `next(f)` calls f(i). Each number i below `count` is
// processed exactly once. Threads take `at_once` numbers whenever they are free, because the rows
// cost unequal times: those of padding only are almost free.
template <typename F>
void share(int64_t count, int64_t at_once, const F& work) {
  const int64_t parts = (count + at_once - 1) / at_once;
  std::atomic<int64_t> taken{0};
  const auto next = [&](auto&& f) {
    for (int64_t part = taken++; part < parts; part = taken++) {
      const int64_t end = clamp((part + 1) * at_once, 0, count);
      for (int64_t i = part * at_once; i < end; ++i) f(i);
    }
  };
  auto thread = [&] { work(next); };
  run_threads(
      parts, [](void* context) { (*static_cast<decltype(thread)*>(context))(); }, &thread);
}

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
  // Below the smallest normal half, a subtraction normalizes the number.
  const uint32_t tiny = bits_of(float_of(rebiased + (1u << 23)) - float_of(113u << 23));
  const uint32_t special = rebiased + (112u << 23);  // infinite or NaN
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
  // To nearest, ties to even: by an addition for results below the smallest normal half, by integer
  // arithmetic above it.
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

// At most four rows of memory with their weights, and a constant: the padding times the missing
// weight, which is 1 minus the sum of the weights.
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

// Sets the rows of the input, at channel u = 0, that mask row `v` of the windows in row `y` reads.
template <typename T, typename A>
inline void rows_read(
    const Geometry& g, const View<const T>& in, int64_t n, int64_t v, int64_t y, A pad,
    RowSum<T>& sum) {
  double missing = 1;
  const int64_t location = y * g.lambda + v - g.shift;
  const RowTaps taps = row_taps(v % g.lambda, g.lambda);
  for (int64_t k = 0; k <= int64_t(g.averages); ++k) {
    for (int64_t j = 0; j < 2; ++j) {
      const int64_t row = v / g.lambda + taps.lower + j;
      const double weight = (j ? taps.fraction : 1 - taps.fraction) * (g.averages ? 0.5 : 1.0);
      if (location + k < 0 || location + k >= g.height || row < 0 || row >= g.side) continue;
      if (weight == 0) continue;
      sum.add(in.data + n * in.n + row * g.side * in.c + (location + k) * in.y, weight);
      missing -= weight;
    }
  }
  sum.constant = static_cast<A>(missing) * pad;
}

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
// Rows are short if lambda is large: a masked step is cheaper than a loop for the remainder.
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
    for (int k = 0; k < sum.count; ++k)
      value += sum.weight[k] * load(sum.row[k][offset + i * step]);
    out[i] = value;
  }
}

// Prefetches the next rows: hardware cannot predict the large step to another channel.
template <typename T>
inline void fetch_rows(const RowSum<T>& sum, int first, int last, int64_t offset, int64_t size) {
  for (int k = first; k < last && k < sum.count; ++k)
    for (int64_t i = 0; i < size; i += int64_t(64 / sizeof(T)))
      __builtin_prefetch(sum.row[k] + offset + i);
}

// out = low + fraction * (high - low): exactly the padding if both are the padding.
template <typename T, typename A>
inline void mix_rows(T* out, const A* low, const A* high, A fraction, int64_t size) {
  if (fraction == A(0)) {
    for (int64_t i = 0; i < size; ++i) store(out + i, low[i]);
  } else {
    for (int64_t i = 0; i < size; ++i) store(out + i, low[i] + fraction * (high[i] - low[i]));
  }
}

#if defined(TENSORMASK_AVX512)
inline void mix_rows(
    float* out, const float* low, const float* high, float fraction, int64_t size) {
  const __m512 f = _mm512_set1_ps(fraction);
  for (int64_t i = 0; i < size; i += 16) {
    const __mmask16 mask = lanes(size - i);
    const __m512 a = _mm512_maskz_loadu_ps(mask, low + i);
    const __m512 b = _mm512_maskz_loadu_ps(mask, high + i);
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

// Sorts `size` locations by their remainder modulo lambda.
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

// The inverse, for the locations -1 .. size - 1: `from` has a column before the first, whose last
// phase is location -1.
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
