// Products of whole matrices of bfloat16 with matrices that are packed for them, in the cache of one thread.
//
// Packed rows: a matrix whose rows are the outputs of a product, (N / 32, K / 2, 32 pairs of inputs). Paired rows: a
// matrix whose rows are what a product sums over, (N / 32, M / 2, 32 pairs of rows). Both are read by `accumulate`.

#pragma once

#include <algorithm>
#include <cstring>

#include "avx512.h"

inline int64_t whole_groups(int64_t n) { return (n + GROUP - 1) / GROUP * GROUP; }

// 32 numbers in bfloat16
inline void store_line(Bf16* to, __m512 first, __m512 last) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(last, first));
}

inline __m512i load_halves(const Bf16* from) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

inline __m512 widen(const Bf16* from) { return _mm512_castsi512_ps(_mm512_slli_epi32(load_halves(from), 16)); }

struct Rows {  // a matrix of which 32 numbers of a row lie together
    const Bf16* first;
    int64_t step, far;  // from a row to the next, and to the row's next 32 numbers
    const Bf16* at(int64_t row, int64_t column) const {
        return first + row * step + column / GROUP * far + column % GROUP;
    }
};

inline Rows in_rows(const Bf16* x, int64_t width) { return {x, width, GROUP}; }

// 16 x 16 numbers of 32 bits, transposed
inline void transpose(__m512i (&x)[16]) {
    __m512i y[16];
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

// x (rows, columns) -> (rows' / 32, columns / 2, 32, 2), rows' whole groups, the rest zeros
inline void pack_rows(Rows x, int64_t rows, int64_t columns, Bf16* to) {
    for (int64_t row = 0; row < whole_groups(rows); row += 16)
        for (int64_t c = 0; c < columns; c += GROUP) {
            __m512i pairs[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++)
                pairs[i] = row + i < rows ? _mm512_loadu_si512(x.at(row + i, c)) : _mm512_setzero_si512();
            transpose(pairs);
            Bf16* group = to + row / GROUP * columns * GROUP + row % GROUP * 2 + c * GROUP;
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) _mm512_storeu_si512(group + i * 2 * GROUP, pairs[i]);
        }
}

// Two rows of 32 numbers -> 32 pairs
inline void store_pairs(Bf16* to, __m512bh first, __m512bh second) {
    const __m512i turns = _mm512_set1_epi32(0x00200000);  // one of the first, one of the second
    const __m512i places = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i low = _mm512_add_epi32(_mm512_mullo_epi32(places, _mm512_set1_epi32(0x00010001)), turns);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(0x00100010));
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16((__m512i)first, low, (__m512i)second));
    _mm512_storeu_si512(to + GROUP, _mm512_permutex2var_epi16((__m512i)first, high, (__m512i)second));
}

// x (rows, columns) -> `count` pairs of (columns / 32, pairs, 32, 2); rows beyond the last are zeros
inline void pair_rows(Rows x, int64_t rows, int64_t count, int64_t columns, Bf16* to, int64_t pairs) {
    for (int64_t p = 0; p < count; p++)
        for (int64_t c = 0; c < columns; c += 16) {
            const __m512i low = 2 * p < rows ? load_halves(x.at(2 * p, c)) : _mm512_setzero_si512();
            const __m512i high = 2 * p + 1 < rows ? load_halves(x.at(2 * p + 1, c)) : _mm512_setzero_si512();
            Bf16* at = to + ((c / GROUP * pairs + p) * GROUP + c % GROUP) * 2;
            _mm512_storeu_si512(at, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
}

template <int R, typename Next, typename Store>
[[gnu::flatten]] void product_tile(int64_t n, const Bf16* a, int64_t step, int64_t inputs, const Bf16* group, Next next,
                                   int64_t row, const Store& store) {
    if (n != R) {
        if constexpr (R > 1) product_tile<R - 1>(n, a, step, inputs, group, next, row, store);
        return;
    }
    __m512 sums[R][2];
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    accumulate<R>(sums, a, step, inputs, group, next);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) store(row + r, sums[r][0], sums[r][1]);
}

// a (rows, inputs), rows `step` apart, times groups that are `size` apart: store(row, output, 16 sums, the next 16)
template <typename Store>
void product(const Bf16* a, int64_t rows, int64_t step, int64_t inputs, const Bf16* packed, int64_t size,
             int64_t groups, const Store& store) {
    const int64_t tiles = (rows + MAX_TILE - 1) / MAX_TILE;
    for (int64_t g = 0; g < groups; g++, packed += size) {
        const auto put = [&](int64_t row, __m512 first, __m512 last) { store(row, g * GROUP, first, last); };
        const char* next = reinterpret_cast<const char*>(packed + size);
        for (int64_t t = 0; t < tiles; t++) {
            const Range tile = share(rows, t, tiles);
            const Ahead ahead{next + 2 * inputs * GROUP * t / tiles, 4 * GROUP / tiles};
            product_tile<MAX_TILE>(tile.end - tile.begin, a + tile.begin * step, step, inputs, packed, ahead,
                                   tile.begin, put);
        }
    }
}

// The same of one tile of rows with what is in the nearest cache
template <typename Store>
void near_product(const Bf16* a, int64_t rows, int64_t step, int64_t inputs, const Bf16* packed, int64_t size,
                  int64_t groups, const Store& store) {
    for (int64_t g = 0; g < groups; g++, packed += size)
        product_tile<MAX_TILE>(rows, a, step, inputs, packed, Nothing{}, 0,
                               [&](int64_t row, __m512 first, __m512 last) { store(row, g * GROUP, first, last); });
}

// N columns of `left`, from `column` on, against a group of `right`, both as paired rows
template <int R, typename Store>
[[gnu::flatten]] void outer_tile(int64_t n, const Bf16* left, const Bf16* right, int64_t pairs, int64_t column,
                                 const Store& store) {
    if (n != R) {
        if constexpr (R > 1) outer_tile<R - 1>(n, left, right, pairs, column, store);
        return;
    }
    __m512 sums[R][2];
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    // a column's pair stands two numbers after that of the column before, the next pair of rows a group later
    for (int64_t p = 0; p < pairs; p++, left += 2 * GROUP, right += 2 * GROUP) {
        const __m512bh first = load_pairs(right), last = load_pairs(right + GROUP);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
            const __m512bh both =
                (__m512bh)_mm512_set1_epi32(*reinterpret_cast<const int32_t*>(left + 2 * (column + r)));
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], first, both);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], last, both);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) store(column + r, sums[r][0], sums[r][1]);
}

// sums += left^T right: (M, N) and (M, K) as paired rows; sums (K / 32, N / 32, 32, 32), blocks of 32 rows of 32.
// CAUSAL: column n of `left` is zero above row n
template <bool CAUSAL>
void add_outer(const Bf16* left, int64_t columns, const Bf16* right, int64_t width, int64_t pairs, float* sums) {
    constexpr int64_t TILES = 3;  // of 11, 11 and 10 columns
    for (int64_t k = 0; k < width; k += GROUP)
        for (int64_t n = 0; n < columns; n += GROUP, sums += GROUP * GROUP) {
#pragma GCC unroll 3
            for (int64_t t = 0; t < TILES; t++) {
                const Range tile = share(GROUP, t, TILES);
                const int64_t begin = CAUSAL ? std::min((n + tile.begin) / 2, pairs) : 0;
                const Bf16* a = left + (n * pairs + begin * GROUP) * 2;
                const Bf16* b = right + (k * pairs + begin * GROUP) * 2;
                for (int64_t i = tile.begin * GROUP; i < tile.end * GROUP; i += 16) _mm_prefetch(sums + i, _MM_HINT_T0);
                outer_tile<MAX_TILE>(tile.end - tile.begin, a, b, pairs - begin, tile.begin,
                                     [&](int64_t c, __m512 first, __m512 last) {
                                         float* to = sums + c * GROUP;
                                         _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), first));
                                         _mm512_storeu_ps(to + 16, _mm512_add_ps(_mm512_loadu_ps(to + 16), last));
                                     });
            }
        }
}

// Where row n begins to be of such blocks: the next 32 numbers of the row are 32 N further
inline int64_t block_row(int64_t n) { return n / GROUP * GROUP * GROUP + n % GROUP * GROUP; }
