// What the compiled kernels share: registers of 16 floats, and products of bfloat16 pairs. For AVX512-BF16 and AVX2.
//
// Weights of a product are packed: groups of 32 outputs, in a group pairs of inputs, in a pair 2 x 16 outputs:
// (N / 32, K / 2, 2, 16, 2), in bfloat16 or int8.

#pragma once

#include <immintrin.h>

#include <cstdint>

using Bf16 = uint16_t;
using Half = uint16_t;  // float16

constexpr int64_t GROUP = 32;  // outputs of a group: two registers

struct Ahead {  // what to bring into the cache meanwhile: two lines a pair of inputs
    const char* next;
    int64_t stride;
    void bring() {
        _mm_prefetch(next, _MM_HINT_T0);
        _mm_prefetch(next + 64, _MM_HINT_T0);
        next += stride;
    }
};

struct Nothing {  // to bring: all is there
    void bring() {}
};

#ifdef __AVX512BF16__
#include "lanes512.h"
#else
#include "lanes256.h"
#endif

// A thread's own variable, looked up here and not again and again where registers are full, as GCC would
template <typename T>
inline T& once(T& own) {
    T* at = &own;
    asm("" : "+r"(at));
    return *at;
}

struct Range {
    int64_t begin, end;
};

// Part `part` of `parts` of `total` things.
inline Range share(int64_t total, int64_t part, int64_t parts) {
    return {total * part / parts, total * (part + 1) / parts};
}

inline Lanes exp16(Lanes x) {  // Cephes' expf; 0 below -87
    const Lanes least = fill(-87.0f);
    const Mask live = reaches(x, least);
    x = smaller(larger(x, least), fill(88.0f));
    const Lanes n = rounded(mul(x, fill(1.44269504f)));
    Lanes r = fnmadd(n, fill(0.693359375f), x);
    r = fnmadd(n, fill(-2.12194440e-4f), r);
    Lanes p = fill(1.9875691500e-4f);
    p = fmadd(p, r, fill(1.3981999507e-3f));
    p = fmadd(p, r, fill(8.3334519073e-3f));
    p = fmadd(p, r, fill(4.1665795894e-2f));
    p = fmadd(p, r, fill(1.6666665459e-1f));
    p = fmadd(p, r, fill(5.0000001201e-1f));
    p = fmadd(mul(p, r), r, add(r, fill(1.0f)));
    return scaled(live, p, n);
}

inline Lanes silu16(Lanes x) {
    const Lanes minus = sub(zeros(), x);
    return quotient(x, add(fill(1.0f), exp16(minus)));
}

constexpr float LOG2_E = 1.44269504f;

// 2^x to the few digits that bfloat16 has, 0 where not `live`
inline Lanes power_of_two(Lanes x, Mask live) {
    const Lanes r = fraction(x);  // 2^x = 2^floor(x) 2^r
    Lanes p = fmadd(fill(7.8024537e-2f), r, fill(2.2606720e-1f));
    p = fmadd(p, r, fill(6.9583349e-1f));
    return scaled(live, fmadd(p, r, fill(9.9992523e-1f)), x);
}

// 1 / (1 + e^-x) to as many digits
inline Lanes sigmoid_few(Lanes x) {
    const Lanes power = power_of_two(mul(x, fill(-LOG2_E)), 0xffff);
    return inverse_few(add(fill(1.0f), power));
}

// sums += rows against a group: R rows of `inputs` numbers, `step` apart.
template <int R, typename Weight, typename Next = Nothing>
inline void accumulate(Lanes (&sums)[R][2], const Bf16* rows, int64_t step, int64_t inputs, const Weight* group,
                       Next next = {}) {
    add_products<R>(sums, rows, step, 2, inputs / 2, group, next);
}
