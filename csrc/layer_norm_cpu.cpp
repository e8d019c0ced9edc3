// Layer norms over the channels of each location on the CPU, for feature maps with channels first:
// tensormask/layers/norm.py calls them.

#include "cpu_isa.h"
#include "layer_norm.h"
#include "tensor_checks.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>

namespace tensormask {
namespace {

using layer_norm::Map;

constexpr int64_t BLOCKS_AT_ONCE = 8;  // that a thread takes, at least

// Requires contiguous tensors of one dtype and of the shapes that belong to `x` (N, C, H, W).
Map check(
    const Tensor& x, std::initializer_list<const Tensor*> maps,
    std::initializer_list<const Tensor*> statistics,
    std::initializer_list<const Tensor*> parameters) {
  require(x.dim() == 4 && x.is_contiguous(), "feature maps must be (N, C, H, W), contiguous");
  const ScalarType type = x.scalar_type();
  require(type == ScalarType::Float || type == ScalarType::Double,
          "feature maps must be float32 or float64, got ", dtype_name(x));
  const int64_t num = x.size(0), channels = x.size(1), height = x.size(2), width = x.size(3);
  const auto require_shape = [&](std::initializer_list<const Tensor*> tensors, const Shape& shape) {
    for (const Tensor* tensor : tensors)
      require(has_shape(*tensor, shape) && tensor->is_contiguous() &&
                  tensor->scalar_type() == type,
              "expected a contiguous ", dtype_name(x), " of ", text(shape), ", got ",
              dtype_name(*tensor), " of ", text(tensor->sizes()));
  };
  require_shape(maps, {num, channels, height, width});
  require_shape(statistics, {num, 1, height, width});
  require_shape(parameters, {channels});
  const int64_t line = 64 / (type == ScalarType::Float ? sizeof(float) : sizeof(double));
  return {num, channels, height * width, line * layer_norm::LINES};
}

template <typename T>
const T* read(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <typename T>
T* write(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// Calls `work(null pointer of the element type, begin, end)`.
template <typename Work>
void run(const Tensor& x, int64_t count, int64_t at_once, const Work& work) {
  torch::stable::parallel_for(0, count, at_once, [&](int64_t begin, int64_t end) {
    if (x.scalar_type() == ScalarType::Float) work(static_cast<float*>(nullptr), begin, end);
    else work(static_cast<double*>(nullptr), begin, end);
  });
}

void forward(
    const Tensor& x, const Tensor& weight, const Tensor& bias, double eps, Tensor out, Tensor mean,
    Tensor rstd) {
  const Map map = check(x, {&out}, {&mean, &rstd}, {&weight, &bias});
  run(x, map.num * map.blocks(), BLOCKS_AT_ONCE, [&](auto* type, int64_t begin, int64_t end) {
    using T = std::remove_pointer_t<decltype(type)>;
    CALL(layer_norm_forward, map, read<T>(x), read<T>(weight), read<T>(bias), eps, write<T>(out),
         write<T>(mean), write<T>(rstd), begin, end);
  });
}

// `sums` (parts, 2, C) gets the gradients of weight and bias of equal parts of the blocks: their
// number, and not that of the threads, decides how they are rounded.
void backward(
    const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd,
    const Tensor& weight, Tensor out, Tensor sums) {
  const Map map = check(x, {&grad, &out}, {&mean, &rstd}, {&weight});
  require(sums.dim() == 3 && sums.is_contiguous() && sums.size(1) == 2 &&
              sums.size(2) == map.channels && sums.scalar_type() == x.scalar_type(),
          "sums must be (parts, 2, C), contiguous, in the dtype of the feature map");
  const int64_t parts = sums.size(0), blocks = map.num * map.blocks();
  run(x, parts, 1, [&](auto* type, int64_t begin, int64_t end) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t part = begin; part < end; ++part) {
      const auto one = [&] {
        CALL(layer_norm_backward, map, read<T>(grad), read<T>(x), read<T>(mean), read<T>(rstd),
             read<T>(weight), write<T>(out), write<T>(sums) + part * 2 * map.channels,
             part * blocks / parts, (part + 1) * blocks / parts);
      };
      one();
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tensormask, m) {
  m.def(
      "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, *, Tensor(a!) out, "
      "Tensor(b!) mean, Tensor(c!) rstd) -> ()");
  m.def(
      "layer_norm_backward(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor weight, *, "
      "Tensor(a!) out, Tensor(b!) sums) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(tensormask, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&forward));
  m.impl("layer_norm_backward", TORCH_BOX(&backward));
}

}  // namespace tensormask
