// CPU kernels of a layer norm over the channels of each location, of feature maps with channels
// first.
//
// As with winograd_kernels.h, whose vectors it uses, one file for each instruction set includes this
// file in its own namespace. A block of locations is read several times and stays in the cache.

template <bool FULL, typename T>
inline Line<T> get(const T* from, int64_t line, int64_t count) {
  Line<T> values;
  if (FULL) std::memcpy(&values, from + line * Lanes<T>::COUNT, sizeof(values));
  else load(from, line * Lanes<T>::COUNT, count, values);
  return values;
}

template <bool FULL, typename T>
inline void put(T* to, int64_t line, int64_t count, const Line<T>& values) {
  if (FULL) std::memcpy(to + line * Lanes<T>::COUNT, &values, sizeof(values));
  else store(to, line * Lanes<T>::COUNT, count, values);
}

template <bool FULL, typename T>
inline int64_t lines_of(int64_t count) {
  return FULL ? layer_norm::LINES : (count + Lanes<T>::COUNT - 1) / Lanes<T>::COUNT;
}

// Normalizes `count` locations; channels are `step` apart.
template <bool FULL, typename T>
inline void normalize(
    const T* x, const T* weight, const T* bias, double eps, int64_t channels, int64_t step,
    int64_t count, T* out, T* mean, T* rstd) {
  const int64_t lines = lines_of<FULL, T>(count);
  Line<T> average[layer_norm::LINES] = {}, factor[layer_norm::LINES] = {};
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t j = 0; j < lines; ++j) average[j] += get<FULL>(x + c * step, j, count);
  for (int64_t j = 0; j < lines; ++j) average[j] /= static_cast<T>(channels);
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t j = 0; j < lines; ++j) {
      const Line<T> centered = get<FULL>(x + c * step, j, count) - average[j];
      factor[j] += centered * centered;
    }
  for (int64_t j = 0; j < lines; ++j) {
    for (int64_t i = 0; i < Lanes<T>::COUNT; ++i)
      factor[j][i] = 1 / std::sqrt(factor[j][i] / channels + static_cast<T>(eps));
    put<FULL>(mean, j, count, average[j]);
    put<FULL>(rstd, j, count, factor[j]);
  }
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t j = 0; j < lines; ++j) {
      const Line<T> unit = (get<FULL>(x + c * step, j, count) - average[j]) * factor[j];
      put<FULL, T>(out + c * step, j, count, unit * weight[c] + bias[c]);
    }
}

template <typename T>
void layer_norm_forward(
    const layer_norm::Map& map, const T* x, const T* weight, const T* bias, double eps, T* out,
    T* mean, T* rstd, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / map.blocks(), start = i % map.blocks() * map.block;
    const int64_t first = n * map.channels * map.locations + start;
    const int64_t count = map.locations - start, at = n * map.locations + start;
    const auto run = count >= map.block ? normalize<true, T> : normalize<false, T>;
    run(x + first, weight, bias, eps, map.channels, map.locations, count, out + first, mean + at,
        rstd + at);
  }
}

// `sums` has two lines for each channel: of the gradients of weight and bias.
template <bool FULL, typename T>
inline void differentiate(
    const T* grad, const T* x, const T* mean, const T* rstd, const T* weight, int64_t channels,
    int64_t step, int64_t count, T* out, T* sums) {
  const int64_t lines = lines_of<FULL, T>(count);
  Line<T> average[layer_norm::LINES], factor[layer_norm::LINES];
  Line<T> first[layer_norm::LINES] = {}, second[layer_norm::LINES] = {};
  for (int64_t j = 0; j < lines; ++j) {
    average[j] = get<FULL>(mean, j, count);
    factor[j] = get<FULL>(rstd, j, count);
  }
  for (int64_t c = 0; c < channels; ++c) {
    T* of_channel = sums + 2 * c * Lanes<T>::COUNT;
    Line<T> of_weight = get<true>(of_channel, 0, 0), of_bias = get<true>(of_channel, 1, 0);
    for (int64_t j = 0; j < lines; ++j) {
      const Line<T> g = get<FULL>(grad + c * step, j, count);
      const Line<T> unit = (get<FULL>(x + c * step, j, count) - average[j]) * factor[j];
      const Line<T> product = g * unit;
      of_weight += product;
      of_bias += g;
      first[j] += g * weight[c];
      second[j] += product * weight[c];
    }
    put<true>(of_channel, 0, 0, of_weight);
    put<true>(of_channel, 1, 0, of_bias);
  }
  for (int64_t j = 0; j < lines; ++j) {
    first[j] /= static_cast<T>(channels);
    second[j] /= static_cast<T>(channels);
  }
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t j = 0; j < lines; ++j) {
      const Line<T> g = get<FULL>(grad + c * step, j, count);
      const Line<T> unit = (get<FULL>(x + c * step, j, count) - average[j]) * factor[j];
      put<FULL, T>(
          out + c * step, j, count, factor[j] * (g * weight[c] - first[j] - unit * second[j]));
    }
}

template <typename T>
void layer_norm_backward(
    const layer_norm::Map& map, const T* grad, const T* x, const T* mean, const T* rstd,
    const T* weight, T* out, T* sums, int64_t begin, int64_t end) {
  constexpr int64_t LANES = Lanes<T>::COUNT;
  std::vector<T> lanes(2 * map.channels * LANES);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / map.blocks(), start = i % map.blocks() * map.block;
    const int64_t first = n * map.channels * map.locations + start;
    const int64_t count = map.locations - start, at = n * map.locations + start;
    const auto run = count >= map.block ? differentiate<true, T> : differentiate<false, T>;
    run(grad + first, x + first, mean + at, rstd + at, weight, map.channels, map.locations, count,
        out + first, lanes.data());
  }
  for (int64_t c = 0; c < map.channels; ++c)
    for (int64_t part = 0; part < 2; ++part) {
      T sum = 0;
      for (int64_t i = 0; i < LANES; ++i) sum += lanes[(2 * c + part) * LANES + i];
      sums[part * map.channels + c] = sum;
    }
}
