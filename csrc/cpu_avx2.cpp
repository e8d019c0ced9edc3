// Compiles the CPU kernels (*_kernels.h) for AVX2 and FMA.

#include "layer_norm.h"
#include "swap_align2nat_cpu.h"
#include "window_masks.h"
#include "winograd.h"

#include <atomic>
#include <vector>

#if defined(TENSORMASK_X86_VARIANTS)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

namespace tensormask {
namespace avx2 {

#include "swap_align2nat_cpu_kernels.h"

#include "window_masks_kernels.h"

#include "winograd_kernels.h"

#include "layer_norm_kernels.h"

TENSORMASK_INSTANTIATE(float)
TENSORMASK_INSTANTIATE(double)
TENSORMASK_INSTANTIATE(Half)
TENSORMASK_INSTANTIATE(BFloat16)
TENSORMASK_INSTANTIATE_WINDOW_MASKS(float)
TENSORMASK_INSTANTIATE_WINDOW_MASKS(double)
TENSORMASK_INSTANTIATE_WINOGRAD(float)
TENSORMASK_INSTANTIATE_LAYER_NORM(float)
TENSORMASK_INSTANTIATE_WINOGRAD(double)
TENSORMASK_INSTANTIATE_LAYER_NORM(double)

}  // namespace avx2
}  // namespace tensormask

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
