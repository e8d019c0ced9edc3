// Declarations shared by swap_align2nat_cpu.cpp and the kernels for each instruction set.
//
// Each instruction set has its own file without torch headers, so that they compile in parallel.

#pragma once

#include "cpu_isa.h"
#include "swap_align2nat.h"

namespace tensormask {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Output rows below this many bytes are written in another order, see `by_location`.
constexpr int64_t SHORT_ROW = 256;
// Rows that a thread takes at a time: neighboring rows read the same memory.
constexpr int64_t ROWS_AT_ONCE = 4;

// Calls `work(context)` on at most `parts` of PyTorch's threads, and waits.
void run_threads(int64_t parts, void (*work)(void* context), void* context);

#define TENSORMASK_KERNELS                                                                       \
  template <typename T>                                                                          \
  void dense_forward(const Geometry& g, View<const T> x, T* out, double pad);                    \
  template <typename T>                                                                          \
  void dense_backward(const Geometry& g, View<const T> grad, T* out);                            \
  template <typename T>                                                                          \
  void windows_forward(                                                                          \
      const Geometry& g, View<const T> x, const int64_t* windows, int64_t count, T* out,         \
      double pad);                                                                               \
  template <typename T>                                                                          \
  void windows_backward(                                                                         \
      const Geometry& g, View<const T> grad, const int64_t* windows, const int64_t* order,       \
      const int64_t* starts, T* out);

namespace baseline {
TENSORMASK_KERNELS
}
namespace avx2 {
TENSORMASK_KERNELS
}
namespace avx512 {
TENSORMASK_KERNELS
}

#define TENSORMASK_INSTANTIATE(T)                                                                \
  template void dense_forward<T>(const Geometry&, View<const T>, T*, double);                    \
  template void dense_backward<T>(const Geometry&, View<const T>, T*);                           \
  template void windows_forward<T>(                                                              \
      const Geometry&, View<const T>, const int64_t*, int64_t, T*, double);                      \
  template void windows_backward<T>(                                                             \
      const Geometry&, View<const T>, const int64_t*, const int64_t*, const int64_t*, T*);

}  // namespace tensormask
