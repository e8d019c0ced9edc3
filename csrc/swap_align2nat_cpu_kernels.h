// All CPU kernels of swap_align2nat: includes their parts (rows, dense, windows).
//
// They are written once and compiled for several instruction sets: one file for each set
// (cpu_*.cpp) includes this file in its own namespace, where instructions beyond the baseline are
// allowed. This file and its parts include no headers: these would be compiled with such
// instructions, and then be called on every machine.
//
// Every kernel processes the two axis pairs one after the other. The first pass combines at most
// four contiguous rows of memory into a buffer that stays in the cache. The second pass works in
// that buffer. There, locations are sorted by their remainder modulo lambda ("phases"), so that
// steps of lambda locations become steps of one.

#include "swap_align2nat_cpu_rows.h"

#include "swap_align2nat_cpu_dense.h"

#include "swap_align2nat_cpu_windows.h"
