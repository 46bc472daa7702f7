// Products of whole matrices of bfloat16 with matrices that are packed for them, in the cache of one thread.
//
// Packed rows: a matrix whose rows are the outputs of a product, (N / 32, K / 2, 32 pairs of inputs). Paired rows: a
// matrix whose rows are what a product sums over, (N / 32, M / 2, 32 pairs of rows). Both are read by `accumulate`.

#pragma once

#include <algorithm>
#include <cstring>

#include "kernels.h"

constexpr int64_t BAND = 12;  // rows that are taken together, whole tiles

inline int64_t whole_groups(int64_t n) { return (n + GROUP - 1) / GROUP * GROUP; }

// 32 numbers in bfloat16
inline void store_line(Bf16* to, Lanes first, Lanes last) {
    put_line(to, line_of(first, last));
}

struct Rows {  // a matrix of which 32 numbers of a row lie together
    const Bf16* first;
    int64_t step, far;  // from a row to the next, and to the row's next 32 numbers
    const Bf16* at(int64_t row, int64_t column) const {
        return first + row * step + column / GROUP * far + column % GROUP;
    }
};

inline Rows in_rows(const Bf16* x, int64_t width) { return {x, width, GROUP}; }

// x (rows, columns) -> (rows' / 32, columns / 2, 32, 2), rows' whole groups, the rest zeros
inline void pack_rows(Rows x, int64_t rows, int64_t columns, Bf16* to) {
    for (int64_t row = 0; row < whole_groups(rows); row += 16)
        for (int64_t c = 0; c < columns; c += GROUP) {
            Words pairs[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++)
                pairs[i] = row + i < rows ? load_words(x.at(row + i, c)) : no_words();
            transpose(pairs);
            Bf16* group = to + row / GROUP * columns * GROUP + row % GROUP * 2 + c * GROUP;
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) put_words(group + i * 2 * GROUP, pairs[i]);
        }
}

// x (rows, columns) -> `count` pairs of (columns / 32, pairs, 32, 2); rows beyond the last are zeros
inline void pair_rows(Rows x, int64_t rows, int64_t count, int64_t columns, Bf16* to, int64_t pairs) {
    for (int64_t p = 0; p < count; p++)
        for (int64_t c = 0; c < columns; c += 16) {
            const Words low = 2 * p < rows ? load_halves(x.at(2 * p, c)) : no_words();
            const Words high = 2 * p + 1 < rows ? load_halves(x.at(2 * p + 1, c)) : no_words();
            Bf16* at = to + ((c / GROUP * pairs + p) * GROUP + c % GROUP) * 2;
            put_words(at, pair_up(low, high));
        }
}

template <int R, typename Next, typename Store>
[[gnu::flatten]] void product_tile(int64_t n, const Bf16* a, int64_t step, int64_t inputs, const Bf16* group, Next next,
                                   int64_t row, const Store& store) {
    if (n != R) {
        if constexpr (R > 1) product_tile<R - 1>(n, a, step, inputs, group, next, row, store);
        return;
    }
    Lanes sums[R][2];
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) sums[r][0] = sums[r][1] = zeros();
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
        const auto put = [&](int64_t row, Lanes first, Lanes last) { store(row, g * GROUP, first, last); };
        const char* next = reinterpret_cast<const char*>(packed + size);
        for (int64_t t = 0; t < tiles; t++) {
            const Range tile = share(rows, t, tiles);
            const Ahead ahead{next + 2 * inputs * GROUP * t / tiles, 4 * GROUP / tiles};
            product_tile<MAX_TILE>(tile.end - tile.begin, a + tile.begin * step, step, inputs, packed, ahead,
                                   tile.begin, put);
        }
    }
}

// The same of a band of rows with what is in the nearest cache
template <typename Store>
void near_product(const Bf16* a, int64_t rows, int64_t step, int64_t inputs, const Bf16* packed, int64_t size,
                  int64_t groups, const Store& store) {
    for (int64_t g = 0; g < groups; g++, packed += size)
        for (int64_t row = 0; row < rows; row += MAX_TILE)
            product_tile<MAX_TILE>(std::min(MAX_TILE, rows - row), a + row * step, step, inputs, packed, Nothing{}, row,
                                   [&](int64_t i, Lanes first, Lanes last) { store(i, g * GROUP, first, last); });
}

// N columns of `left`, from `column` on, against a group of `right`, both as paired rows
template <int R, typename Store>
[[gnu::flatten]] void outer_tile(int64_t n, const Bf16* left, const Bf16* right, int64_t pairs, int64_t column,
                                 const Store& store) {
    if (n != R) {
        if constexpr (R > 1) outer_tile<R - 1>(n, left, right, pairs, column, store);
        return;
    }
    Lanes sums[R][2];
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) sums[r][0] = sums[r][1] = zeros();
    // a column's pair stands two numbers after that of the column before, the next pair of rows a group later
    add_products<R>(sums, left + 2 * column, 2, 2 * GROUP, pairs, right, Nothing{});
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) store(column + r, sums[r][0], sums[r][1]);
}

// sums += left^T right: (M, N) and (M, K) as paired rows; sums (K / 32, N / 32, 32, 32), blocks of 32 rows of 32.
// CAUSAL: column n of `left` is zero above row n
template <bool CAUSAL>
void add_outer(const Bf16* left, int64_t columns, const Bf16* right, int64_t width, int64_t pairs, float* sums) {
    constexpr int64_t TILES = (GROUP + MAX_TILE - 1) / MAX_TILE;
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
                                     [&](int64_t c, Lanes first, Lanes last) {
                                         float* to = sums + c * GROUP;
                                         put16(to, add(load(to), first));
                                         put16(to + 16, add(load(to + 16), last));
                                     });
            }
        }
}

// Where row n begins to be of such blocks: the next 32 numbers of the row are 32 N further
inline int64_t block_row(int64_t n) { return n / GROUP * GROUP * GROUP + n % GROUP * GROUP; }
