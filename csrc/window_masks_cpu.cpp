// window_masks on the CPU: the operators that check arguments, allocate results and call kernels.

#include "swap_align2nat_cpu.h"
#include "tensor_checks.h"
#include "window_masks.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

namespace tensormask {
namespace {

using window_masks::Channels;
using window_masks::Inputs;
using Sizes = window_masks::Geometry;

Sizes check(
    const Tensor& x, const Tensor& weight, const Tensor& windows, int64_t steps, int64_t zoom) {
  const auto type = x.scalar_type();
  require((type == ScalarType::Float || type == ScalarType::Double) &&
              weight.scalar_type() == type && x.dim() == 4 && weight.dim() == 2 &&
              x.is_contiguous() && weight.is_contiguous() && x.size(3) == weight.size(1),
          "x must be (N, H, W, C) and weight (V*U, C), contiguous, both float32 or float64, got ",
          dtype_name(x), " of shape ", text(x.sizes()), " and ", dtype_name(weight), " of shape ",
          text(weight.sizes()));
  require(windows.scalar_type() == ScalarType::Long && windows.is_cpu() && windows.dim() == 2 &&
              windows.size(1) == 3 && windows.is_contiguous(),
          "windows must be (K, 3), contiguous, int64 on the CPU");
  require(steps >= 1 && zoom >= 1, "steps and zoom must be >= 1");
  Sizes g{x.size(0), x.size(1), x.size(2), x.size(3), 0, steps, zoom, 0};
  while ((g.side + 1) * (g.side + 1) <= weight.size(0)) ++g.side;
  require(g.side >= 1 && g.side * g.side == weight.size(0),
          "weight must have a square number of rows, got ", weight.size(0));
  g.out_side = g.side * steps * zoom;
  const int64_t* window = windows.const_data_ptr<int64_t>();
  for (int64_t k = 0; k < windows.size(0); ++k, window += 3)
    require(window[0] >= 0 && window[0] < g.num_images && window[1] >= 0 &&
                window[1] * steps < g.height && window[2] >= 0 && window[2] * steps < g.width,
            "window (n, y, x) = [", window[0], ", ", window[1], ", ", window[2],
            "] is outside of the grid");
  return g;
}

Channels channels_of(const Sizes& g) {
  Channels channels(g);
  require(channels.most() <= window_masks::READ, "windows read ", channels.most(),
          " channels at a location along an axis, more than ", window_masks::READ);
  return channels;
}

template <typename T>
Inputs<T> inputs_of(const Tensor& x, const Tensor& weight, const Tensor& windows) {
  return {static_cast<const T*>(x.const_data_ptr()), static_cast<const T*>(weight.const_data_ptr()),
          windows.const_data_ptr<int64_t>(), windows.size(0)};
}

// Calls `work(null pointer of the element type)`.
template <typename Work>
void with_type(const Tensor& x, const Work& work) {
  if (x.scalar_type() == ScalarType::Float) work(static_cast<float*>(nullptr));
  else work(static_cast<double*>(nullptr));
}

Tensor forward(
    const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& windows,
    int64_t steps, int64_t zoom, double pad_val) {
  const Sizes g = check(x, weight, windows, steps, zoom);
  require(bias.is_contiguous() && bias.numel() == weight.size(0) &&
              bias.scalar_type() == x.scalar_type(),
          "bias must be (V*U,), contiguous, in the dtype of x");
  const Shape shape{windows.size(0), g.out_side, g.out_side};
  Tensor out = torch::stable::new_empty(x, shape);
  if (out.numel() == 0) return out;
  const Channels channels = channels_of(g);
  with_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Inputs<T> in = inputs_of<T>(x, weight, windows);
    CALL(window_masks_forward, g, channels, in, static_cast<const T*>(bias.const_data_ptr()),
         pad_val, static_cast<T*>(out.mutable_data_ptr()));
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& windows,
    int64_t steps, int64_t zoom) {
  const Sizes g = check(x, weight, windows, steps, zoom);
  require(grad.is_contiguous() && grad.scalar_type() == x.scalar_type() &&
              has_shape(grad, {windows.size(0), g.out_side, g.out_side}),
          "grad must be the contiguous gradient of the masks, got shape ", text(grad.sizes()));
  const Channels channels = channels_of(g);
  // Each thread sums the gradients of the weights by itself, and they are added in order: the same
  // number of threads gives the same bits.
  const int64_t parts = std::max<int64_t>(1, torch::stable::get_num_threads());
  Tensor grad_x = torch::stable::new_zeros(x, Shape(x.sizes().begin(), x.sizes().end()));
  Tensor sums = torch::stable::new_zeros(x, Shape{parts, g.side * g.side, g.features + 1});
  Tensor grad_weight = torch::stable::new_zeros(x, Shape{g.side * g.side, g.features});
  Tensor grad_bias = torch::stable::new_zeros(x, Shape{g.side * g.side});
  with_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Inputs<T> in = inputs_of<T>(x, weight, windows);
    T* const to_x = static_cast<T*>(grad_x.mutable_data_ptr());
    T* const to_sums = static_cast<T*>(sums.mutable_data_ptr());
    const int64_t rows = g.side * g.side, size = rows * (g.features + 1);
    const auto call = [&](int64_t part) {
      T* const to = to_sums + part * size;
      CALL(window_masks_backward, g, channels, in, static_cast<const T*>(grad.const_data_ptr()),
           to_x, to, to + rows * g.features, part, parts);
    };
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) call(part);
    });
    T* const to_weight = static_cast<T*>(grad_weight.mutable_data_ptr());
    T* const to_bias = static_cast<T*>(grad_bias.mutable_data_ptr());
    for (int64_t part = 0; part < parts; ++part) {
      const T* from = to_sums + part * size;
      for (int64_t i = 0; i < rows * g.features; ++i) to_weight[i] += from[i];
      for (int64_t i = 0; i < rows; ++i) to_bias[i] += from[rows * g.features + i];
    }
  });
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tensormask, m) {
  m.def(
      "window_masks(Tensor x, Tensor weight, Tensor bias, Tensor windows, int steps, int zoom, "
      "float pad_val) -> Tensor");
  m.def(
      "window_masks_backward(Tensor grad, Tensor x, Tensor weight, Tensor windows, int steps, "
      "int zoom) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(tensormask, CPU, m) {
  m.impl("window_masks", TORCH_BOX(&forward));
  m.impl("window_masks_backward", TORCH_BOX(&backward));
}

}  // namespace tensormask
