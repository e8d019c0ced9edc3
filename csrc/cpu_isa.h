// The instruction sets of the CPU kernels: a namespace for each, and the choice at run time.

#pragma once

#include <type_traits>

#if defined(__x86_64__) && defined(__GNUC__)
#define TENSORMASK_X86_VARIANTS
#endif

namespace tensormask {

#if defined(TENSORMASK_X86_VARIANTS)
enum class Isa { BASELINE, AVX2, AVX512 };

inline Isa isa() {
  static const Isa found = [] {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx2 ? (avx512 ? Isa::AVX512 : Isa::AVX2) : Isa::BASELINE;
  }();
  return found;
}
#endif

// Calls FUNCTION<T> of the widest variant that this machine supports. AVX-512 is only for float32:
// short rows gain from its masked steps, and each variant costs seconds of compile time.
#if defined(TENSORMASK_X86_VARIANTS)
#define CALL(FUNCTION, ...)                                                      \
  do {                                                                           \
    if constexpr (std::is_same_v<T, float>)                                      \
      if (isa() == Isa::AVX512) return avx512::FUNCTION<T>(__VA_ARGS__);         \
    if (isa() != Isa::BASELINE) return avx2::FUNCTION<T>(__VA_ARGS__);           \
    return baseline::FUNCTION<T>(__VA_ARGS__);                                   \
  } while (false)
#else
#define CALL(FUNCTION, ...) return baseline::FUNCTION<T>(__VA_ARGS__)
#endif

}  // namespace tensormask
