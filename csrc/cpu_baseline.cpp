// Compiles the kernels of swap_align2nat_cpu_kernels.h and winograd_kernels.h for any machine.

#include "swap_align2nat_cpu.h"
#include "window_masks.h"
#include "winograd.h"

#include <atomic>
#include <vector>

namespace tensormask {
namespace baseline {

#include "swap_align2nat_cpu_kernels.h"

#include "window_masks_kernels.h"

#include "winograd_kernels.h"

TENSORMASK_INSTANTIATE(float)
TENSORMASK_INSTANTIATE(double)
TENSORMASK_INSTANTIATE(Half)
TENSORMASK_INSTANTIATE(BFloat16)
TENSORMASK_INSTANTIATE_WINDOW_MASKS(float)
TENSORMASK_INSTANTIATE_WINDOW_MASKS(double)
TENSORMASK_INSTANTIATE_WINOGRAD(float)
TENSORMASK_INSTANTIATE_WINOGRAD(double)

}  // namespace baseline
}  // namespace tensormask
