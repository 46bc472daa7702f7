// What the compiled kernels share: registers of 16 floats, and products of bfloat16 pairs. For AVX512-BF16.
//
// Weights of a product are packed: groups of 32 outputs, in a group pairs of inputs, in a pair 2 x 16 outputs:
// (N / 32, K / 2, 2, 16, 2), in bfloat16 or int8.

#pragma once

#include <immintrin.h>

#include <cstdint>

using Bf16 = uint16_t;

constexpr int64_t GROUP = 32;     // outputs of a group: two registers
constexpr int64_t MAX_TILE = 12;  // rows of a tile: 24 of 32 registers hold sums

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

inline __m512 exp512(__m512 x) {  // Cephes' expf; 0 below -87
    const __m512 least = _mm512_set1_ps(-87.0f);
    const __mmask16 live = _mm512_cmp_ps_mask(x, least, _CMP_GE_OQ);
    x = _mm512_min_ps(_mm512_max_ps(x, least), _mm512_set1_ps(88.0f));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_maskz_scalef_ps(live, p, n);
}

inline __m512 silu512(__m512 x) {
    const __m512 minus = _mm512_sub_ps(_mm512_setzero_ps(), x);
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), exp512(minus)));
}

constexpr float LOG2_E = 1.44269504f;

// 2^x to the few digits that bfloat16 has, 0 where not `live`
inline __m512 power_of_two(__m512 x, __mmask16 live) {
    const __m512 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);  // 2^x = 2^floor(x) 2^r
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(7.8024537e-2f), r, _mm512_set1_ps(2.2606720e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9583349e-1f));
    return _mm512_maskz_scalef_ps(live, _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.9992523e-1f)), x);
}

// 1 / (1 + e^-x) to as many digits
inline __m512 sigmoid_few(__m512 x) {
    const __m512 power = power_of_two(_mm512_mul_ps(x, _mm512_set1_ps(-LOG2_E)), 0xffff);
    return _mm512_rcp14_ps(_mm512_add_ps(_mm512_set1_ps(1.0f), power));
}

inline void store_bf16(Bf16* to, __m512 x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x));
}

inline __m512bh load_pairs(const Bf16* from) { return (__m512bh)_mm512_loadu_si512(from); }

inline __m512bh load_pairs(const int8_t* from) {
    const __m128i* halves = reinterpret_cast<const __m128i*>(from);
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(halves)));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(halves + 1)));
    return _mm512_cvtne2ps_pbh(high, low);
}

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

// sums += rows against a group: R rows of `inputs` numbers, `step` apart.
template <int R, typename Weight, typename Next = Nothing>
inline void accumulate(__m512 (&sums)[R][2], const Bf16* rows, int64_t step, int64_t inputs, const Weight* group,
                       Next next = {}) {
    for (int64_t k = 0; k < inputs; k += 2, group += 2 * GROUP) {
        next.bring();
        const __m512bh first = load_pairs(group), last = load_pairs(group + GROUP);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
            const int32_t pair = *reinterpret_cast<const int32_t*>(rows + r * step + k);
            const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], first, both);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], last, both);
        }
    }
}
