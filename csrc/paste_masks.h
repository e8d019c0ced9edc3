// Pasting masks into frames: bilinear interpolation at pixel centers, 0 outside of the mask. Shared by
// the CPU and the CUDA kernel.
//
// The masks of a call are one array, and have sizes of their own. Row k of `layout` (K, 3) holds the
// offset of mask k, its height V and its width U; row k of `boxes` (K, 4) holds x0, y0, x1, y1.

#pragma once

#include "host_device.h"

#include <cmath>
#include <cstdint>

namespace tensormask {
namespace paste {

// One axis of a mask of `side` pixels in a box from `begin` to `end`. Only the frame's pixels `first`
// to `last` can have a value of 1/2: outside of its box, a bilinear mask is below. One more pixel
// allows for rounding.
template <typename A>
struct Axis {
  A begin, scale;
  int side, first, last;

  static TENSORMASK_HOST_DEVICE Axis of(A begin, A end, int side, int num_pixels) {
    const A low = std::floor(begin) - A(1), high = std::ceil(end) + A(1);
    Axis axis{begin, A(side) / (end - begin), side, 0, num_pixels};
    if (low > A(0)) axis.first = low < A(num_pixels) ? static_cast<int>(low) : num_pixels;
    if (high < A(num_pixels)) axis.last = high > A(0) ? static_cast<int>(high) : 0;
    return axis;
  }

  // Finds the mask pixel before the center of a frame's pixel, and the weight of the next one. It is -1
  // before the mask (and for NaN) and `side` behind it, with weight 0.
  TENSORMASK_HOST_DEVICE void locate(int pixel, int* lower, A* weight) const {
    A location = (static_cast<A>(pixel) + A(0.5) - begin) * scale - A(0.5);
    location = location > A(-1) ? location : A(-1);
    location = location < A(side) ? location : A(side);
    const A below = std::floor(location);
    *lower = static_cast<int>(below);
    *weight = location - below;
  }
};

// Interpolate between two rows of a mask (V, U) at column `u`; 0 outside of the mask.
template <typename A>
TENSORMASK_HOST_DEVICE A between_rows(const A* mask, int height, int width, int v, A weight, int u) {
  if (u < 0 || u >= width) return A(0);
  const A low = v >= 0 && v < height ? mask[int64_t(v) * width + u] : A(0);
  const A high = v + 1 < height ? mask[int64_t(v + 1) * width + u] : A(0);
  return low + weight * (high - low);
}

}  // namespace paste
}  // namespace tensormask
