// Compiles the CPU kernels (*_kernels.h) for AVX-512: only float32, see cpu_isa.h.

#include "layer_norm.h"
#include "swap_align2nat_cpu.h"
#include "window_masks.h"
#include "winograd.h"

#include <atomic>
#include <vector>

#if defined(TENSORMASK_X86_VARIANTS)
#include <immintrin.h>

#define TENSORMASK_AVX512
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
#endif

namespace tensormask {
namespace avx512 {

#include "swap_align2nat_cpu_kernels.h"

#include "window_masks_kernels.h"

#include "winograd_kernels.h"

#include "layer_norm_kernels.h"

TENSORMASK_INSTANTIATE(float)
TENSORMASK_INSTANTIATE_WINDOW_MASKS(float)
TENSORMASK_INSTANTIATE_WINOGRAD(float)
TENSORMASK_INSTANTIATE_LAYER_NORM(float)

}  // namespace avx512
}  // namespace tensormask

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
