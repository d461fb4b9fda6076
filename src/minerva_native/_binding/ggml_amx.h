// Included before ggml's matrix multiplication with AMX, by the compiler's -include.
//
// To GCC before 11.5, 12.4 and 13.3 `_tile_loadconfig` reads 8 bytes of its 64 (GCC bug 114098), so what ggml has
// written to the others is optimised away, and a CPU with AMX faults. Nor does it know that `_tile_loadd` reads memory.
#ifndef MINERVA_GGML_AMX_H
#define MINERVA_GGML_AMX_H

#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__)

#include <immintrin.h>

#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg %0" ::"m"(*(const char(*)[64])(config)))

#undef _tile_loadd
#define _tile_loadd(tile, base, stride)           \
    do {                                          \
        __asm__ volatile("" ::: "memory");        \
        _tile_loadd_internal(tile, base, stride); \
    } while (0)

#endif

#endif
