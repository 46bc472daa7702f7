// What the compiled kernels do with registers, on CPUs with AVX512-BF16. The same for others: lanes256.h.

#pragma once

using Lanes = __m512;   // 16 floats
using Words = __m512i;  // 16 whole numbers
using Line = __m512bh;  // 32 numbers in bfloat16
using Mask = __mmask16;

constexpr int64_t MAX_TILE = 12;  // rows of a tile: 24 of 32 registers hold sums

// --- floats -------------------------------------------------------------------------------------------------------

inline Lanes fill(float x) { return _mm512_set1_ps(x); }
inline Lanes zeros() { return _mm512_setzero_ps(); }
inline Lanes load(const float* from) { return _mm512_loadu_ps(from); }
inline void put16(float* to, Lanes x) { _mm512_storeu_ps(to, x); }
inline Lanes add(Lanes a, Lanes b) { return _mm512_add_ps(a, b); }
inline Lanes sub(Lanes a, Lanes b) { return _mm512_sub_ps(a, b); }
inline Lanes mul(Lanes a, Lanes b) { return _mm512_mul_ps(a, b); }
inline Lanes quotient(Lanes a, Lanes b) { return _mm512_div_ps(a, b); }
inline Lanes larger(Lanes a, Lanes b) { return _mm512_max_ps(a, b); }
inline Lanes smaller(Lanes a, Lanes b) { return _mm512_min_ps(a, b); }
inline Lanes fmadd(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }    // a b + c
inline Lanes fmsub(Lanes a, Lanes b, Lanes c) { return _mm512_fmsub_ps(a, b, c); }    // a b - c
inline Lanes fnmadd(Lanes a, Lanes b, Lanes c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
inline Lanes rounded(Lanes x) { return _mm512_roundscale_ps(x, 0); }
inline Lanes fraction(Lanes x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF); }  // x - floor(x)
inline Lanes inverse_few(Lanes x) { return _mm512_rcp14_ps(x); }                       // 14 bits
inline float sum_of(Lanes x) { return _mm512_reduce_add_ps(x); }
inline float most_of(Lanes x) { return _mm512_reduce_max_ps(x); }
inline float least_of(Lanes x) { return _mm512_reduce_min_ps(x); }
inline float inverse_root_few(float x) {  // 14 bits
    const __m128 wide = _mm_set_ss(x);
    return _mm_cvtss_f32(_mm_rsqrt14_ss(wide, wide));
}

// --- some of them -------------------------------------------------------------------------------------------------

inline Mask first_lanes(int64_t count) { return count >= 16 ? 0xffff : (1 << count) - 1; }
inline bool any(Mask mask) { return mask; }
inline Mask reaches(Lanes a, Lanes b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline Mask below(Lanes a, Lanes b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline Mask same(Lanes a, Lanes b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
inline Lanes pick(Mask mask, Lanes yes, Lanes no) { return _mm512_mask_mov_ps(no, mask, yes); }
inline Lanes load_some(Mask mask, const float* from, Lanes rest) { return _mm512_mask_loadu_ps(rest, mask, from); }
inline void put_some(float* to, Mask mask, Lanes x) { _mm512_mask_storeu_ps(to, mask, x); }
inline Lanes scaled(Mask mask, Lanes x, Lanes n) { return _mm512_maskz_scalef_ps(mask, x, n); }  // x 2^floor(n), or 0

// --- whole numbers ------------------------------------------------------------------------------------------------

inline Words no_words() { return _mm512_setzero_si512(); }
inline Words fill_words(int32_t x) { return _mm512_set1_epi32(x); }
inline Words count_up() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
inline Words load_words(const void* from) { return _mm512_loadu_si512(from); }
inline void put_words(void* to, Words x) { _mm512_storeu_si512(to, x); }
inline Words add_words(Words a, Words b) { return _mm512_add_epi32(a, b); }
inline Words pick_words(Mask mask, Words yes, Words no) { return _mm512_mask_mov_epi32(no, mask, yes); }
inline Mask same_words(Words a, Words b) { return _mm512_cmpeq_epi32_mask(a, b); }
inline int32_t least_word(Mask mask, Words x) { return _mm512_mask_reduce_min_epi32(mask, x); }

// 16 x 16 of them, transposed
inline void transpose(Words (&x)[16]) {
    Words y[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        y[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
        y[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        x[4 * i] = _mm512_unpacklo_epi64(y[4 * i], y[4 * i + 2]);
        x[4 * i + 1] = _mm512_unpackhi_epi64(y[4 * i], y[4 * i + 2]);
        x[4 * i + 2] = _mm512_unpacklo_epi64(y[4 * i + 1], y[4 * i + 3]);
        x[4 * i + 3] = _mm512_unpackhi_epi64(y[4 * i + 1], y[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        y[i] = _mm512_shuffle_i32x4(x[i], x[4 + i], 0x88);
        y[4 + i] = _mm512_shuffle_i32x4(x[i], x[4 + i], 0xdd);
        y[8 + i] = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0x88);
        y[12 + i] = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        x[i] = _mm512_shuffle_i32x4(y[i], y[8 + i], 0x88);
        x[4 + i] = _mm512_shuffle_i32x4(y[4 + i], y[12 + i], 0x88);
        x[8 + i] = _mm512_shuffle_i32x4(y[i], y[8 + i], 0xdd);
        x[12 + i] = _mm512_shuffle_i32x4(y[4 + i], y[12 + i], 0xdd);
    }
}

// --- 16 bits ------------------------------------------------------------------------------------------------------

inline Words load_halves(const Bf16* from) {  // in the low halves of words
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline Words pair_up(Words low, Words high) { return _mm512_or_si512(low, _mm512_slli_epi32(high, 16)); }
inline Lanes widened(Words halves) { return _mm512_castsi512_ps(_mm512_slli_epi32(halves, 16)); }
inline Lanes widen(const Bf16* from) { return widened(load_halves(from)); }
inline Lanes widen_some(Mask mask, const Bf16* from, Lanes rest) {
    return pick(mask, widened(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from))), rest);
}
inline void store_bf16(Bf16* to, Lanes x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x));
}
inline void store_some_bf16(Bf16* to, Mask mask, Lanes x) {
    _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(x));
}
inline Line line_of(Lanes first, Lanes last) { return _mm512_cvtne2ps_pbh(last, first); }
inline Line no_line() { return (Line)_mm512_setzero_si512(); }
inline void put_line(Bf16* to, Line x) { _mm512_storeu_si512(to, (__m512i)x); }
inline void put_some_line(Bf16* to, int64_t count, Line x) {  // fewer than 32
    const __mmask32 there = (1u << count) - 1;
    _mm512_mask_storeu_epi16(to, there, (__m512i)x);
}

// Two rows of 32 numbers -> 32 pairs
inline void store_pairs(Bf16* to, Line first, Line second) {
    const __m512i turns = _mm512_set1_epi32(0x00200000);  // one of the first, one of the second
    const __m512i places = count_up();
    const __m512i low = _mm512_add_epi32(_mm512_mullo_epi32(places, _mm512_set1_epi32(0x00010001)), turns);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(0x00100010));
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16((__m512i)first, low, (__m512i)second));
    _mm512_storeu_si512(to + 32, _mm512_permutex2var_epi16((__m512i)first, high, (__m512i)second));
}

inline Lanes load_half(const Half* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline void put_half(Half* to, Lanes x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(x, 0));
}

// --- products of pairs --------------------------------------------------------------------------------------------

inline Line load_line(const int8_t* from) {
    const __m128i* halves = reinterpret_cast<const __m128i*>(from);
    const Lanes low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(halves)));
    const Lanes high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(halves + 1)));
    return line_of(low, high);
}
inline Line load_line(const Bf16* from) { return (Line)_mm512_loadu_si512(from); }

// sums += products of R times `count` pairs, `row_step` and `pair_step` apart, with those of a group
template <int R, typename Weight, typename Next>
inline void add_products(Lanes (&sums)[R][2], const Bf16* pairs, int64_t row_step, int64_t pair_step, int64_t count,
                         const Weight* group, Next next) {
    for (const Weight* end = group + 2 * GROUP * count; group < end; pairs += pair_step, group += 2 * GROUP) {
        next.bring();
        const Line first = load_line(group), last = load_line(group + GROUP);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
            const Line pair = (Line)_mm512_set1_epi32(*reinterpret_cast<const int32_t*>(pairs + r * row_step));
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], first, pair);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], last, pair);
        }
    }
}
