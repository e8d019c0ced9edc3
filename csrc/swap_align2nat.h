// The geometry of swap_align2nat, shared by the CPU and the CUDA kernels.
//
// The input is an aligned tensor (N, V*U, H, W) with V == U, the output a natural one
// (N, lambda*V * lambda*U, ceil(H / lambda), ceil(W / lambda)). The output value at mask row v of
// window row y is interpolated between input places and input mask rows at
//
//     oy = y * lambda + v - lambda * V / 2 + 0.5        (places, along H)
//     ov = (v + 0.5) / lambda - 0.5                     (mask rows, along V)
//
// and in the same way at ox, ou along W and U. What lies outside, on any of the four axes, reads
// the padding value p, so that op(X) = p + L(X - p) with L = L_y (x) L_x: L_y acts on (H, V) only,
// L_x on (W, U) only, with at most four taps each. Both are the same function of one axis pair,
// which is what this file describes; the words below are those of (H, V).
//
// Two facts make the kernels fast. The fraction of oy depends on nothing: lambda * V even means
// that two neighbouring places are averaged, odd that one place is read. And the floor of oy,
//
//     place = (y + q) * lambda + r - lambda * V / 2     with v = q * lambda + r,
//
// depends on y + q only, while the weights of the mask rows depend on r only. With r held, places
// step by lambda as windows step by one.

#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define TENSORMASK_HOST_DEVICE __host__ __device__
#else
#define TENSORMASK_HOST_DEVICE
#endif

namespace tensormask {

// Between mask rows `lower` and `lower + 1` of the input, relative to q: -1 or 0.
struct RowTaps {
  int64_t lower;
  double fraction;  // the weight of `lower + 1`; that of `lower` is 1 - fraction
};

// ov of a mask row q * lambda + r, relative to q: (2r + 1 - lambda) / (2 lambda) above q.
TENSORMASK_HOST_DEVICE inline RowTaps row_taps(int64_t r, int64_t lambda) {
  const int64_t above = 2 * r + 1 - lambda;
  const double fraction = static_cast<double>(above) / static_cast<double>(2 * lambda);
  return above < 0 ? RowTaps{-1, fraction + 1.0} : RowTaps{0, fraction};
}

// Sizes and steps of one call. Extents are those of the input (height, width) and of the output's
// windows (out_height, out_width).
struct Geometry {
  int64_t num_images, side, height, width, lambda;
  int64_t out_side, out_height, out_width;
  int64_t shift;   // place = window * lambda + mask row - shift
  bool averages;   // of two neighbouring places; otherwise the one place is read

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
