// What lanes512.h does, on CPUs with AVX2 and FMA: two registers for one. Pairs are multiplied as floats, which hold
// products of bfloat16 exactly.

#pragma once

#include <cstring>

struct Lanes {  // 16 floats
    __m256 low, high;
};
struct Words {  // 16 whole numbers
    __m256i low, high;
};
struct Line {  // 32 numbers in bfloat16
    __m256i low, high;
};
struct Mask {
    __m256i low, high;  // all bits of a lane or none
    Mask(__m256i low, __m256i high) : low(low), high(high) {}
    Mask(uint32_t bits)
        : low(of(bits, _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128))),
          high(of(bits, _mm256_setr_epi32(256, 512, 1024, 2048, 4096, 8192, 16384, 32768))) {}
    static __m256i of(uint32_t bits, __m256i lanes) {
        return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(bits), lanes), lanes);
    }
};

constexpr int64_t MAX_TILE = 2;  // rows of a tile: 8 of 16 registers hold sums; with 12 some are spilled

// --- floats -------------------------------------------------------------------------------------------------------

inline Lanes fill(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Lanes zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Lanes load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
inline void put16(float* to, Lanes x) { _mm256_storeu_ps(to, x.low), _mm256_storeu_ps(to + 8, x.high); }
inline Lanes add(Lanes a, Lanes b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Lanes sub(Lanes a, Lanes b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Lanes mul(Lanes a, Lanes b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Lanes quotient(Lanes a, Lanes b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline Lanes larger(Lanes a, Lanes b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline Lanes smaller(Lanes a, Lanes b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
inline Lanes fmadd(Lanes a, Lanes b, Lanes c) {  // a b + c
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Lanes fmsub(Lanes a, Lanes b, Lanes c) {  // a b - c
    return {_mm256_fmsub_ps(a.low, b.low, c.low), _mm256_fmsub_ps(a.high, b.high, c.high)};
}
inline Lanes fnmadd(Lanes a, Lanes b, Lanes c) {  // c - a b
    return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
inline Lanes rounded(Lanes x) {
    constexpr int NEAREST = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.low, NEAREST), _mm256_round_ps(x.high, NEAREST)};
}
inline Lanes fraction(Lanes x) {  // x - floor(x)
    return sub(x, {_mm256_floor_ps(x.low), _mm256_floor_ps(x.high)});
}
inline Lanes inverse_few(Lanes x) { return quotient(fill(1.0f), x); }  // all bits: guesses differ between makers
inline float sum_of(Lanes x) {
    const __m256 eight = _mm256_add_ps(x.low, x.high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float most_of(Lanes x) {
    const __m256 eight = _mm256_max_ps(x.low, x.high);
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
inline float least_of(Lanes x) { return -most_of(sub(zeros(), x)); }
inline float inverse_root_few(float x) { return 1 / _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x))); }

// --- some of them -------------------------------------------------------------------------------------------------

inline Mask first_lanes(int64_t count) { return count >= 16 ? 0xffff : (1 << count) - 1; }
inline bool any(Mask mask) { return !_mm256_testz_si256(_mm256_or_si256(mask.low, mask.high), _mm256_set1_epi32(-1)); }
template <int HOW>
inline Mask compared(Lanes a, Lanes b) {
    return {_mm256_castps_si256(_mm256_cmp_ps(a.low, b.low, HOW)),
            _mm256_castps_si256(_mm256_cmp_ps(a.high, b.high, HOW))};
}
inline Mask reaches(Lanes a, Lanes b) { return compared<_CMP_GE_OQ>(a, b); }
inline Mask below(Lanes a, Lanes b) { return compared<_CMP_LT_OQ>(a, b); }
inline Mask same(Lanes a, Lanes b) { return compared<_CMP_EQ_OQ>(a, b); }
inline Lanes pick(Mask mask, Lanes yes, Lanes no) {
    return {_mm256_blendv_ps(no.low, yes.low, _mm256_castsi256_ps(mask.low)),
            _mm256_blendv_ps(no.high, yes.high, _mm256_castsi256_ps(mask.high))};
}
inline Lanes load_some(Mask mask, const float* from, Lanes rest) {
    return pick(mask, {_mm256_maskload_ps(from, mask.low), _mm256_maskload_ps(from + 8, mask.high)}, rest);
}
inline void put_some(float* to, Mask mask, Lanes x) {
    _mm256_maskstore_ps(to, mask.low, x.low), _mm256_maskstore_ps(to + 8, mask.high, x.high);
}
inline __m256 power(__m256 n) {  // 2^floor(n); 0 below -126
    const __m256 whole = _mm256_floor_ps(_mm256_max_ps(n, _mm256_set1_ps(-127.0f)));
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23));
}
inline Lanes scaled(Mask mask, Lanes x, Lanes n) {  // x 2^floor(n), or 0
    return {_mm256_and_ps(_mm256_castsi256_ps(mask.low), _mm256_mul_ps(x.low, power(n.low))),
            _mm256_and_ps(_mm256_castsi256_ps(mask.high), _mm256_mul_ps(x.high, power(n.high)))};
}

// --- whole numbers ------------------------------------------------------------------------------------------------

inline Words no_words() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Words fill_words(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Words count_up() {
    return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)};
}
inline Words load_words(const void* from) {
    const __m256i* at = static_cast<const __m256i*>(from);
    return {_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)};
}
inline void put_words(void* to, Words x) {
    __m256i* at = static_cast<__m256i*>(to);
    _mm256_storeu_si256(at, x.low), _mm256_storeu_si256(at + 1, x.high);
}
inline Words add_words(Words a, Words b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }
inline Words pick_words(Mask mask, Words yes, Words no) {
    return {_mm256_blendv_epi8(no.low, yes.low, mask.low), _mm256_blendv_epi8(no.high, yes.high, mask.high)};
}
inline Mask same_words(Words a, Words b) {
    return {_mm256_cmpeq_epi32(a.low, b.low), _mm256_cmpeq_epi32(a.high, b.high)};
}
inline int32_t least_word(Mask mask, Words x) {
    int32_t words[16], least = INT32_MAX;
    put_words(words, pick_words(mask, x, fill_words(INT32_MAX)));
    for (int32_t word : words) least = word < least ? word : least;
    return least;
}

// 8 x 8 of them, rows and results two registers apart
inline void transpose8(const __m256i* rows, __m256i* to) {
    __m256 x[8], y[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m256 even = _mm256_castsi256_ps(rows[4 * i]), odd = _mm256_castsi256_ps(rows[4 * i + 2]);
        x[2 * i] = _mm256_unpacklo_ps(even, odd), x[2 * i + 1] = _mm256_unpackhi_ps(even, odd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m256 first = x[i / 2 * 4 + i % 2], last = x[i / 2 * 4 + i % 2 + 2];
        y[2 * i] = _mm256_shuffle_ps(first, last, 0x44), y[2 * i + 1] = _mm256_shuffle_ps(first, last, 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        to[2 * i] = _mm256_castps_si256(_mm256_permute2f128_ps(y[i], y[i + 4], 0x20));
        to[2 * i + 8] = _mm256_castps_si256(_mm256_permute2f128_ps(y[i], y[i + 4], 0x31));
    }
}

// 16 x 16 of them, transposed
inline void transpose(Words (&x)[16]) {
    Words y[16];
    transpose8(&x[0].low, &y[0].low), transpose8(&x[8].low, &y[0].high);
    transpose8(&x[0].high, &y[8].low), transpose8(&x[8].high, &y[8].high);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) x[i] = y[i];
}

// --- 16 bits ------------------------------------------------------------------------------------------------------

inline Words load_halves(const Bf16* from) {  // in the low halves of words
    const __m128i* at = reinterpret_cast<const __m128i*>(from);
    return {_mm256_cvtepu16_epi32(_mm_loadu_si128(at)), _mm256_cvtepu16_epi32(_mm_loadu_si128(at + 1))};
}
inline Words pair_up(Words low, Words high) {
    return {_mm256_or_si256(low.low, _mm256_slli_epi32(high.low, 16)),
            _mm256_or_si256(low.high, _mm256_slli_epi32(high.high, 16))};
}
inline Lanes widened(Words halves) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(halves.low, 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(halves.high, 16))};
}
inline Lanes widen(const Bf16* from) { return widened(load_halves(from)); }
inline int count_of(Mask mask) {  // of lanes, the first ones
    return _mm_popcnt_u32(_mm256_movemask_ps(_mm256_castsi256_ps(mask.low)) << 8 |
                          _mm256_movemask_ps(_mm256_castsi256_ps(mask.high)));
}
inline Lanes widen_some(Mask mask, const Bf16* from, Lanes rest) {
    Bf16 room[16] = {};
    const int count = count_of(mask);
    if (count == 16) return widen(from);
    std::memcpy(room, from, count * sizeof(Bf16));
    return pick(mask, widen(room), rest);
}
inline __m256i rounded_bf16(__m256 x) {  // to the nearest, the even one of two, in the low halves of words
    const __m256i bits = _mm256_castps_si256(x), one = _mm256_set1_epi32(1);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
    return _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
}
inline __m256i halves_of(Lanes x) {
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded_bf16(x.low), rounded_bf16(x.high)), 0xd8);
}
inline void store_bf16(Bf16* to, Lanes x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves_of(x)); }
inline void store_some_bf16(Bf16* to, Mask mask, Lanes x) {
    Bf16 room[16];
    store_bf16(room, x);
    std::memcpy(to, room, count_of(mask) * sizeof(Bf16));
}
inline Line line_of(Lanes first, Lanes last) { return {halves_of(first), halves_of(last)}; }
inline Line no_line() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline void put_line(Bf16* to, Line x) {
    __m256i* at = reinterpret_cast<__m256i*>(to);
    _mm256_storeu_si256(at, x.low), _mm256_storeu_si256(at + 1, x.high);
}
inline void put_some_line(Bf16* to, int64_t count, Line x) {  // fewer than 32
    Bf16 room[32];
    put_line(room, x);
    std::memcpy(to, room, count * sizeof(Bf16));
}

// Two rows of 32 numbers -> 32 pairs
inline void store_pairs(Bf16* to, Line first, Line second) {
    const auto put = [](Bf16* at, __m256i a, __m256i b) {
        const __m256i low = _mm256_unpacklo_epi16(a, b), high = _mm256_unpackhi_epi16(a, b);
        put_line(at, {_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31)});
    };
    put(to, first.low, second.low), put(to + 32, first.high, second.high);
}

inline Lanes load_half(const Half* from) {
    const __m128i* at = reinterpret_cast<const __m128i*>(from);
    return {_mm256_cvtph_ps(_mm_loadu_si128(at)), _mm256_cvtph_ps(_mm_loadu_si128(at + 1))};
}
inline void put_half(Half* to, Lanes x) {
    __m128i* at = reinterpret_cast<__m128i*>(to);
    _mm_storeu_si128(at, _mm256_cvtps_ph(x.low, 0)), _mm_storeu_si128(at + 1, _mm256_cvtps_ph(x.high, 0));
}

// --- products of pairs --------------------------------------------------------------------------------------------

inline Line load_line(const int8_t* from) {
    const auto eight = [&](int i) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + 8 * i))));
    };
    return line_of({eight(0), eight(1)}, {eight(2), eight(3)});
}

struct Firsts {  // of 8 pairs, as floats
    static __m256 of(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
    static __m256 at(const Bf16* from) { return of(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))); }
    static __m256 at(const int8_t* from) {
        const __m256i pairs = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
        return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(pairs, 16), 16));
    }
};
struct Seconds {
    static __m256 of(__m256i pairs) {
        return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(0xffff0000)));
    }
    static __m256 at(const Bf16* from) { return of(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))); }
    static __m256 at(const int8_t* from) {
        const __m256i pairs = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
        return _mm256_cvtepi32_ps(_mm256_srai_epi32(pairs, 16));
    }
};

template <typename Which, int R, typename Weight>
inline void add_half_products(__m256 (&sums)[R][4], const Bf16* pairs, int64_t row_step, const Weight* group) {
    __m256 row[R];
#pragma GCC unroll 2
    for (int r = 0; r < R; r++)
        row[r] = Which::of(_mm256_set1_epi32(*reinterpret_cast<const int32_t*>(pairs + r * row_step)));
#pragma GCC unroll 4
    for (int n = 0; n < 4; n++) {
        const __m256 weight = Which::at(group + 16 * n);
#pragma GCC unroll 2
        for (int r = 0; r < R; r++) sums[r][n] = _mm256_fmadd_ps(weight, row[r], sums[r][n]);
    }
}

// sums += products of R times `count` pairs, `row_step` and `pair_step` apart, with those of a group
template <int R, typename Weight, typename Next>
inline void add_products(Lanes (&sums)[R][2], const Bf16* pairs, int64_t row_step, int64_t pair_step, int64_t count,
                         const Weight* group, Next next) {
    __m256 own[R][4];
#pragma GCC unroll 2
    for (int r = 0; r < R; r++)
        own[r][0] = sums[r][0].low, own[r][1] = sums[r][0].high, own[r][2] = sums[r][1].low, own[r][3] = sums[r][1].high;
#pragma GCC unroll 2
    for (int64_t i = 0; i < count; i++, pairs += pair_step, group += 2 * GROUP) {
        next.bring();
        add_half_products<Firsts, R>(own, pairs, row_step, group);
        asm("" : "+r"(group), "+r"(pairs));  // else what was loaded is kept, for which there are no registers
        add_half_products<Seconds, R>(own, pairs, row_step, group);
    }
#pragma GCC unroll 2
    for (int r = 0; r < R; r++) sums[r][0] = {own[r][0], own[r][1]}, sums[r][1] = {own[r][2], own[r][3]};
}
