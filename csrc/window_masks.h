// Masks of chosen windows, computed from the features below the last convolution: declarations
// shared by window_masks_cpu.cpp and the kernels for each instruction set.
//
// An aligned mask head predicts A(v, u, y, x) = <W(v, u), X(y, x)> + b(v, u) at each location, and
// swap_align2nat reads it at the windows. A mask pixel reads at most two neighboring locations and
// two neighboring channels along each axis pair, (H, V) and (W, U). So of the V * U channels at a
// location, a window reads at most 4 x 4, where its mask pixels are finer than the locations (on
// feature maps that are not upsampled: `zoom` > 1, see tensormask/layers/window_masks.py).

#pragma once

#include "cpu_isa.h"

#include <cstdint>
#include <vector>

namespace tensormask {
namespace window_masks {

constexpr int64_t READ = 4;  // channels that the mask pixels around a location read, at most

inline int64_t floor_divide(int64_t a, int64_t b) { return a / b - (a % b < 0); }

// What one mask row (or column) reads along one axis pair.
struct Reads {
  int64_t location[2], channel[2];  // those without weight are valid, too
  double weight[2], share[2];       // of the locations; of the channels
};

struct Geometry {
  int64_t num_images, height, width, features, side, steps, zoom, out_side;

  // `start` is the location of the window's center, `extent` the number of locations.
  Reads reads(int64_t row, int64_t start, int64_t extent) const {
    Reads r{};
    // In units of mask pixels: twice the offset from the center.
    const int64_t twice = 2 * row + 1 - out_side, fine = floor_divide(twice, 2);
    const int64_t taps = twice % 2 == 0 ? 1 : 2, cell = floor_divide(fine, zoom);
    double low = 0, high = 0;
    for (int64_t tap = fine; tap < fine + taps; ++tap) {
      if (start * zoom + tap < 0 || start * zoom + tap >= extent * zoom) continue;
      const double fraction = double(tap - cell * zoom) / double(zoom);
      low += (1 - fraction) / double(taps);
      high += fraction / double(taps);
    }
    int64_t first = start + cell;
    if (first < 0) {
      first = 0;
      low = high;
      high = 0;
    }
    if (first + 1 >= extent) {  // beyond the last location, its values repeat
      first = extent - 1;
      low += high;
      high = 0;
    }
    const int64_t unit = steps * zoom, offset = 2 * row + 1 - unit;
    const int64_t channel = floor_divide(offset, 2 * unit);
    const double fraction = double(offset - channel * 2 * unit) / double(2 * unit);
    const bool lower = channel >= 0, upper = channel + 1 < side;
    r.location[0] = first;
    r.location[1] = first + 1 < extent ? first + 1 : first;
    r.weight[0] = low;
    r.weight[1] = high;
    r.channel[0] = lower ? channel : 0;
    r.channel[1] = upper ? channel + 1 : side - 1;
    r.share[0] = lower ? 1 - fraction : 0;
    r.share[1] = upper ? fraction : 0;
    return r;
  }
};

// The channels that a window reads at each location, along one axis pair, far from the border.
struct Channels {
  int64_t origin = 0;                // offset of the first location from the window's center
  std::vector<int64_t> first, count;  // per location

  explicit Channels(const Geometry& g) {
    const int64_t far = g.steps * g.side + 2;
    for (int64_t row = 0; row < g.out_side; ++row) {
      const Reads r = g.reads(row, far, 2 * far);
      if (row == 0) origin = r.location[0] - far;
      for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < 2; ++j) {
          if (r.weight[i] * r.share[j] == 0) continue;
          const int64_t at = r.location[i] - far - origin;
          if (at == int64_t(first.size())) {  // Rows are in order, and so are their channels.
            first.push_back(r.channel[j]);
            count.push_back(1);
          }
          const int64_t read = r.channel[j] - first[at] + 1;
          count[at] = read > count[at] ? read : count[at];
        }
      }
    }
  }

  int64_t most() const {
    int64_t result = 0;
    for (int64_t each : count) result = each > result ? each : result;
    return result;
  }
};

template <typename T>
struct Inputs {
  const T* x;          // (num_images, height, width, features)
  const T* weight;     // (side * side, features)
  const int64_t* windows;
  int64_t count;
};

}  // namespace window_masks

// Threads: `run_threads` of swap_align2nat_cpu.h.
#define TENSORMASK_WINDOW_MASKS                                                                  \
  template <typename T>                                                                          \
  void window_masks_forward(                                                                     \
      const window_masks::Geometry& g, const window_masks::Channels& channels,                   \
      const window_masks::Inputs<T>& in, const T* bias, double pad, T* out);                     \
  template <typename T>                                                                          \
  void window_masks_backward(                                                                    \
      const window_masks::Geometry& g, const window_masks::Channels& channels,                   \
      const window_masks::Inputs<T>& in, const T* grad, T* grad_x, T* grad_weight, T* grad_bias, \
      int64_t part, int64_t parts);

namespace baseline {
TENSORMASK_WINDOW_MASKS
}
namespace avx2 {
TENSORMASK_WINDOW_MASKS
}
namespace avx512 {
TENSORMASK_WINDOW_MASKS
}

#define TENSORMASK_INSTANTIATE_WINDOW_MASKS(T)                                                   \
  template void window_masks_forward<T>(                                                         \
      const window_masks::Geometry&, const window_masks::Channels&,                              \
      const window_masks::Inputs<T>&, const T*, double, T*);                                     \
  template void window_masks_backward<T>(                                                        \
      const window_masks::Geometry&, const window_masks::Channels&,                              \
      const window_masks::Inputs<T>&, const T*, T*, T*, T*, int64_t, int64_t);

}  // namespace tensormask
