// Winograd's F(4x4, 3x3) on the CPU: the operators that cut feature maps into tiles and assemble
// them. tensormask/layers/winograd.py explains the 36 matrices, and multiplies them.

#include "cpu_isa.h"
#include "tensor_checks.h"
#include "winograd.h"

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <optional>

namespace tensormask {
namespace {

using winograd::Chunk;
using winograd::FeatureMap;

constexpr int64_t TILES_AT_ONCE = 8;  // that a thread takes, at least

// Requires that `map` is in channels_last, and `matrices` (36, images, rows, columns, channels).
Chunk check(const Tensor& map, const Tensor& matrices, int64_t image, int64_t row) {
  require(map.dim() == 4 && (map.stride(1) == 1 || map.size(1) == 1),
          "feature maps must be (N, C, H, W) in channels_last");
  require(matrices.dim() == 5 && matrices.is_contiguous() && matrices.size(0) == 36 &&
              matrices.size(4) == map.size(1),
          "matrices must be (36, images, rows, columns, ", map.size(1), "), contiguous, got ",
          text(matrices.sizes()));
  const ScalarType type = map.scalar_type();
  require((type == ScalarType::Float || type == ScalarType::Double) &&
              type == matrices.scalar_type(),
          "feature maps and matrices must have the same dtype, float32 or float64, got ",
          dtype_name(map), " and ", dtype_name(matrices));
  require(image >= 0 && row >= 0, "image and row must not be negative");
  return {matrices.size(2), matrices.size(3), map.size(1), image, row, matrices.stride(0)};
}

template <typename T>
FeatureMap<T> map_of(const Tensor& x, T* data) {
  return {data, x.stride(0), x.stride(2), x.stride(3), x.size(0), x.size(2), x.size(3)};
}

template <typename T>
const T* read(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <typename T>
T* write(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// Calls `work(null pointer of the element type, begin, end)` for the tiles of `matrices`.
template <typename Work>
void for_tiles(const Tensor& matrices, const Work& work) {
  const int64_t tiles = matrices.size(1) * matrices.size(2) * matrices.size(3);
  torch::stable::parallel_for(0, tiles, TILES_AT_ONCE, [&](int64_t begin, int64_t end) {
    if (matrices.scalar_type() == ScalarType::Float) work(static_cast<float*>(nullptr), begin, end);
    else work(static_cast<double*>(nullptr), begin, end);
  });
}

void input(const Tensor& x, int64_t padding, int64_t image, int64_t row, Tensor out) {
  const Chunk chunk = check(x, out, image, row);
  for_tiles(out, [&](auto* type, int64_t begin, int64_t end) {
    using T = std::remove_pointer_t<decltype(type)>;
    CALL(winograd_input, map_of(x, read<T>(x)), padding, chunk, write<T>(out), begin, end);
  });
}

void grad(const Tensor& x, int64_t image, int64_t row, Tensor out) {
  const Chunk chunk = check(x, out, image, row);
  for_tiles(out, [&](auto* type, int64_t begin, int64_t end) {
    using T = std::remove_pointer_t<decltype(type)>;
    CALL(winograd_grad, map_of(x, read<T>(x)), chunk, write<T>(out), begin, end);
  });
}

void output(
    const Tensor& matrices, const std::optional<Tensor>& bias, int64_t image, int64_t row,
    Tensor out) {
  const Chunk chunk = check(out, matrices, image, row);
  require(!bias || (bias->is_contiguous() && bias->numel() == chunk.channels &&
                    bias->scalar_type() == out.scalar_type()),
          "the bias must have one value per channel, in the dtype of the results");
  for_tiles(matrices, [&](auto* type, int64_t begin, int64_t end) {
    using T = std::remove_pointer_t<decltype(type)>;
    CALL(winograd_output, read<T>(matrices), bias ? read<T>(*bias) : nullptr, chunk,
         map_of(out, write<T>(out)), begin, end);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tensormask, m) {
  m.def("winograd_input(Tensor x, int padding, int image, int row, *, Tensor(a!) out) -> ()");
  m.def("winograd_grad(Tensor grad, int image, int row, *, Tensor(a!) out) -> ()");
  m.def(
      "winograd_output(Tensor matrices, Tensor? bias, int image, int row, *, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(tensormask, CPU, m) {
  m.impl("winograd_input", TORCH_BOX(&input));
  m.impl("winograd_grad", TORCH_BOX(&grad));
  m.impl("winograd_output", TORCH_BOX(&output));
}

}  // namespace tensormask
