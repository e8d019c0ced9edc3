// The geometry of swap_align2nat, shared by the CPU and the CUDA kernels.
//
// The input is an aligned tensor (N, V*U, H, W) with V == U, the output a natural one
// (N, lambda*V * lambda*U, ceil(H / lambda), ceil(W / lambda)). The output value at mask row v of
// window row y is interpolated between input locations and input mask rows at
//
//     oy = y * lambda + v - lambda * V / 2 + 0.5        (locations, along H)
//     ov = (v + 0.5) / lambda - 0.5                     (mask rows, along V)
//
// and likewise at ox, ou along W and U. Outside of the input, on any of the four axes, the padding
// value p is read. So op(X) = p + L(X - p) with L = L_y (x) L_x: L_y acts on (H, V) only, L_x on
// (W, U) only, with at most four taps each. Both are the same function of one axis pair. This file
// describes that function, in the words of (H, V).
//
// Two facts make the kernels fast. First, the fraction of oy is constant: if lambda * V is even,
// two neighboring locations are averaged; if it is odd, one is read. Second, the floor of oy,
//
//     location = (y + q) * lambda + r - lambda * V / 2     with v = q * lambda + r,
//
// depends only on y + q, and the weights of the mask rows depend only on r. For a constant r, a
// step of one window is a step of lambda locations.

#pragma once

#include "host_device.h"

#include <cstdint>

namespace tensormask {

// Interpolation between the mask rows `lower` and `lower + 1` of the input.
struct RowTaps {
  int64_t lower;    // relative to q: -1 or 0
  double fraction;  // the weight of `lower + 1`; the weight of `lower` is 1 - fraction
};

// The taps of the mask row q * lambda + r: its ov is q + (2r + 1 - lambda) / (2 lambda).
TENSORMASK_HOST_DEVICE inline RowTaps row_taps(int64_t r, int64_t lambda) {
  const int64_t above = 2 * r + 1 - lambda;
  const double fraction = static_cast<double>(above) / static_cast<double>(2 * lambda);
  return above < 0 ? RowTaps{-1, fraction + 1.0} : RowTaps{0, fraction};
}

// Sizes of one call: (height, width) locations of the input, (out_height, out_width) windows of the
// output.
struct Geometry {
  int64_t num_images, side, height, width, lambda;
  int64_t out_side, out_height, out_width;
  int64_t shift;  // location = window * lambda + mask row - shift
  bool averages;  // two neighboring locations; otherwise one location is read

  static TENSORMASK_HOST_DEVICE Geometry of(
      int64_t num_images, int64_t side, int64_t height, int64_t width, int64_t lambda) {
    Geometry g{};
    g.num_images = num_images;
    g.side = side;
    g.height = height;
    g.width = width;
    g.lambda = lambda;
    g.out_side = side * lambda;
    g.out_height = (height + lambda - 1) / lambda;
    g.out_width = (width + lambda - 1) / lambda;
    g.shift = g.out_side / 2;
    g.averages = g.out_side % 2 == 0;
    return g;
  }
};

// A 4D tensor (N, C, y, x) in memory; steps in elements.
template <typename T>
struct View {
  T* data;
  int64_t n, c, y, x;
};

}  // namespace tensormask
