// BEING WRITTEN BY THE FOUNDER (main thread), 2026-11-23 21:55: helper E, leave this file and
// tests/cuda_on_cpu* to me; do everything else (Python side, setup.py with the CUDA branch, Makefile, CI,
// tests, benchmark). It will export the same four ops as the CPU file, registered for CUDA, using
// swap_align2nat.h and swap_align2nat_checks.h.
