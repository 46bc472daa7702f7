// Causal attention of one sequence, forward and backward, for dalle/train_native.cpp.

#pragma once

#include <array>
#include <limits>

#include "train_parts.h"

namespace {

int64_t even(int64_t n) { return n + n % 2; }

struct Sequence {  // what its heads look at
    int64_t length;
    const float *cosine, *sine;  // (L, K)
    const float* bias;           // (L): 0, or -inf where a key is padding; or null
};

struct HeadRoom {                 // of a thread; L' is the length in whole groups
    Halves queries, keys, given;  // (L, K): a head's, in rows
    Halves by_rows, by_pairs;     // (L', K): keys packed, values paired
    Halves keys_paired, values_packed, queries_paired, given_paired, weights, p_pairs, ds_pairs;
    Floats dkeys, dvalues, dqueries, above, delta;
    std::vector<uint32_t> real;  // (L' / 32): keys that are no padding, a bit each
};

// A head of qkv, of which 32 numbers of all places lie together: (H + 2 H_kv) K / 32, L, 32
Rows head_of(const Bf16* qkv, int64_t head, int64_t length, int64_t width) {
    return {qkv + head * width * length, GROUP, length * GROUP};
}

// Scores are binary logarithms.
Rotary query_rotary(const Shape& s, const Weights& w, const Sequence& q, float unit) {
    return {w.q_norm, q.cosine, q.sine, s.head_eps, unit / std::sqrt(static_cast<float>(s.head_dim))};
}

Rotary key_rotary(const Shape& s, const Weights& w, const Sequence& q, float unit) {
    return {w.k_norm, q.cosine, q.sine, s.head_eps, unit};
}

constexpr float LN_2 = 0.69314718f;
constexpr float MOST_EXPONENT = 100;  // sums of 2^x and their products with values stay finite

void note_keys(const Sequence& q, std::vector<uint32_t>& real) {
    real.assign(whole_groups(q.length) / GROUP, 0);
    for (int64_t key = 0; key < q.length; key++)
        if (!q.bias || q.bias[key] == 0) real[key / GROUP] |= 1u << key % GROUP;
}

// The keys of a group that `row` looks at
uint32_t seen_by(const HeadRoom& r, int64_t row, int64_t group) {
    const int64_t left = std::clamp<int64_t>(row + 1 - group * GROUP, 0, GROUP);
    return r.real[group] & static_cast<uint32_t>((1ull << left) - 1);
}

auto put_floats(float* to, int64_t width) {
    return [=](int64_t row, int64_t n, Lanes first, Lanes last) {
        put16(to + row * width + n, first);
        put16(to + row * width + n + 16, last);
    };
}

struct Softmax {         // of the rows of a band
    float top[BAND];     // what is taken from a row's scores
    Lanes total[BAND];  // sums of 2^(scores - top), 16 to be added up
};

struct WeighTile {  // some rows of queries of a band, from `row` on, against a group of keys
    int64_t begin, row, group, head_dim, width;
};

// Their weights, which go to r.weights, rows `width` apart
template <int R>
[[gnu::flatten]] void weigh_tile(int64_t n, HeadRoom& r, const WeighTile& t, Softmax& softmax) {
    if (n != R) {
        if constexpr (R > 1) weigh_tile<R - 1>(n, r, t, softmax);
        return;
    }
    const int64_t K = t.head_dim, first = t.row - t.begin;
    Lanes scores[R][2];
#pragma GCC unroll 12
    for (int i = 0; i < R; i++) scores[i][0] = scores[i][1] = fill(-softmax.top[first + i]);
    accumulate<R>(scores, r.queries.data() + t.row * K, K, K, r.by_rows.data() + t.group * K * GROUP);
    Bf16* weights = r.weights.data() + first * t.width + t.group * GROUP;
#pragma GCC unroll 12
    for (int i = 0; i < R; i++) {
        const uint32_t seen = seen_by(r, t.row + i, t.group);
        const Lanes low = power_of_two(scores[i][0], seen), high = power_of_two(scores[i][1], seen >> 16);
        softmax.total[first + i] = add(softmax.total[first + i], add(low, high));
        store_line(weights + i * t.width, low, high);
    }
}

// The largest score of each row, which may be too large to be an exponent
void find_tops(const HeadRoom& r, int64_t row, int64_t rows, int64_t width, int64_t K, float* tops) {
    std::fill_n(tops, rows, -std::numeric_limits<float>::infinity());
    near_product(r.queries.data() + row * K, rows, K, K, r.by_rows.data(), K * GROUP, width / GROUP,
                 [&](int64_t i, int64_t key, Lanes first, Lanes last) {
                     const uint32_t seen = seen_by(r, row + i, key / GROUP);
                     const Lanes top = fill(tops[i]), low = pick(seen, larger(top, first), top);
                     tops[i] = most_of(pick(seen >> 16, larger(low, last), low));
                 });
}

float largest(const float* x, int64_t width) {
    return std::abs(*std::max_element(x, x + width, [](float a, float b) { return std::abs(a) < std::abs(b); }));
}

// softmax(q k^T) v of all heads: qkv ((H + 2 H_kv) K / 32, L, 32) -> attended (L, H K), lse (H, L) of base 2
void attend_forward(const Shape& s, const Weights& w, const Sequence& q, HeadRoom& r, const Bf16* qkv, Bf16* attended,
                    float* lse) {
    const int64_t K = s.head_dim, L = q.length, whole = whole_groups(L), shared = s.heads / s.kv_heads;
    Bf16 *queries = room(r.queries, L * K), *keys = room(r.keys, L * K), *weights = room(r.weights, BAND * whole);
    // a normed head is no longer than sqrt(K) times its largest gain
    const bool moderate = std::sqrt(K) * LOG2_E * largest(w.q_norm, K) * largest(w.k_norm, K) < MOST_EXPONENT;
    note_keys(q, r.real);
    for (int64_t head = 0; head < s.heads; head++) {
        const int64_t kv = head / shared;
        if (head % shared == 0) {
            rotate_rows(head_of(qkv, s.heads + kv, L, K), L, K, key_rotary(s, w, q, 1), keys);
            pack_rows(in_rows(keys, K), L, K, room(r.by_rows, whole * K));
            const Rows values = head_of(qkv, s.heads + s.kv_heads + kv, L, K);
            pair_rows(values, L, whole / 2, K, room(r.by_pairs, whole * K), whole / 2);
        }
        rotate_rows(head_of(qkv, head, L, K), L, K, query_rotary(s, w, q, LOG2_E), queries);
        for (int64_t begin = 0; begin < L; begin += BAND) {
            const int64_t rows = std::min(BAND, L - begin), width = whole_groups(begin + rows);
            Softmax softmax = {};
            if (!moderate) find_tops(r, begin, rows, width, K, softmax.top);
            for (int64_t group = 0; group < width / GROUP; group++)
                for (int64_t row = begin; row < begin + rows; row += MAX_TILE)
                    weigh_tile<MAX_TILE>(std::min(MAX_TILE, begin + rows - row), r, {begin, row, group, K, width},
                                         softmax);
            float inverse[BAND];
            for (int64_t i = 0; i < rows; i++) {
                const float sum = sum_of(softmax.total[i]);
                inverse[i] = 1 / sum, lse[head * L + begin + i] = softmax.top[i] + std::log2(sum);
            }
            near_product(weights, rows, width, even(begin + rows), r.by_pairs.data(), whole * GROUP, K / GROUP,
                         [&](int64_t i, int64_t k, Lanes first, Lanes last) {
                             Bf16* to = attended + (begin + i) * s.inner() + head * K + k;
                             store_line(to, mul(first, fill(inverse[i])),
                                        mul(last, fill(inverse[i])));
                         });
        }
    }
}

struct BackTile {               // some rows of a query head against a group of keys
    int64_t begin, row, group;  // the first row of ds that is kept, the first row here, the group
    int64_t head_dim, width, pairs;
};

// Probabilities of R rows, an even number, and the gradients ds of their scores: ds in rows, both as paired rows
template <int R>
[[gnu::flatten]] void back_tile(int64_t n, HeadRoom& r, const BackTile& t) {
    if (n != R) {
        if constexpr (R > 2) back_tile<R - 2>(n, r, t);
        return;
    }
    Lanes p[R][2], ds[R][2];
#pragma GCC unroll 6
    for (int i = 0; i < R; i++) {
        p[i][0] = p[i][1] = fill(-r.above[t.row + i]);
        ds[i][0] = ds[i][1] = fill(-r.delta[t.row + i]);
    }
    const int64_t K = t.head_dim, size = K * GROUP;
    accumulate<R>(p, r.queries.data() + t.row * K, K, K, r.by_rows.data() + t.group * size);
    accumulate<R>(ds, r.given.data() + t.row * K, K, K, r.values_packed.data() + t.group * size);
    Bf16* rows = r.weights.data() + (t.row - t.begin) * t.width + t.group * GROUP;
    const int64_t pair = (t.group * t.pairs + t.row / 2) * 2 * GROUP;
#pragma GCC unroll 3
    for (int i = 0; i < R; i += 2) {
        Line lines[2][2];
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            const uint32_t seen = seen_by(r, t.row + i + j, t.group);
            const Lanes low = power_of_two(p[i + j][0], seen), high = power_of_two(p[i + j][1], seen >> 16);
            lines[0][j] = line_of(low, high);
            lines[1][j] = line_of(mul(low, ds[i + j][0]), mul(high, ds[i + j][1]));
            put_line(rows + (i + j) * t.width, lines[1][j]);
        }
        store_pairs(r.p_pairs.data() + pair + i * GROUP, lines[0][0], lines[0][1]);
        store_pairs(r.ds_pairs.data() + pair + i * GROUP, lines[1][0], lines[1][1]);
    }
}

// What comes to a head's result, in rows and as paired rows, its product with the result, and the logarithms; a row of
// zeros makes the rows even
void take_given(const Shape& s, HeadRoom& r, int64_t head, const Bf16* attended, const float* lse, const Bf16* given) {
    const int64_t K = s.head_dim, L = s.length, pairs = (L + 1) / 2;
    Bf16* rows = room(r.given, 2 * pairs * K);
    float *delta = room(r.delta, 2 * pairs), *above = room(r.above, 2 * pairs);
    for (int64_t t = 0; t < L; t++) {
        Lanes sum = zeros();
        for (int64_t k = 0; k < K; k += 16) {
            const int64_t at = t * s.inner() + head * K + k;
            sum = fmadd(widen(given + at), widen(attended + at), sum);
        }
        std::copy_n(given + t * s.inner() + head * K, K, rows + t * K);
        delta[t] = sum_of(sum), above[t] = lse[head * L + t];
    }
    if (L % 2) std::fill_n(rows + L * K, K, 0), delta[L] = above[L] = 0;
    pair_rows(in_rows(rows, K), L, pairs, K, room(r.given_paired, pairs * K * 2), pairs);
}

// What the head after this one reads, by as many times as there are tiles
std::array<Coming, 3> next_heads(const Shape& s, const Sequence& q, int64_t head, const Bf16* qkv) {
    const int64_t size = q.length * s.head_dim, tiles = (q.length + BAND - 1) / BAND;
    const int64_t kv = s.heads + head * s.kv_heads / s.heads + 1, last = s.heads + 2 * s.kv_heads;
    const auto coming = [=](int64_t n) { return Coming(n < last ? qkv + n * size : nullptr, size, tiles); };
    return {coming(head + 1), coming(kv), coming(kv + s.kv_heads)};
}

// A query head: dq into qkv's gradient, and what it adds to dkeys and dvalues, in blocks as `add_outer` has them
void attend_head_back(const Shape& s, const Weights& w, const Weights& by, const Sequence& q, HeadRoom& r, int64_t head,
                      const Bf16* qkv, Bf16* dqkv) {
    const int64_t K = s.head_dim, L = q.length, whole = whole_groups(L), pairs = (L + 1) / 2;
    float* dqueries = room(r.dqueries, BAND * K);
    Bf16 *queries = room(r.queries, 2 * pairs * K), *weights = room(r.weights, BAND * whole);
    room(r.p_pairs, pairs * whole * 2), room(r.ds_pairs, pairs * whole * 2);
    const Rows raw = head_of(qkv, head, L, K);
    rotate_rows(raw, L, K, query_rotary(s, w, q, LOG2_E), queries);
    if (L % 2) std::fill_n(queries + L * K, K, 0);
    pair_rows(in_rows(queries, K), L, pairs, K, room(r.queries_paired, pairs * K * 2), pairs);
    std::array<Coming, 3> next = next_heads(s, q, head, qkv);
    for (int64_t begin = 0; begin < L; begin += BAND) {
        for (Coming& coming : next) coming.bring();
        constexpr int64_t FEW = std::max<int64_t>(MAX_TILE / 2, 2);
        const int64_t rows = std::min(BAND, L - begin), width = whole_groups(begin + rows), end = begin + rows;
        for (int64_t group = 0; group < width / GROUP; group++)
            for (int64_t row = begin; row < end; row += FEW)
                back_tile<FEW>(std::min(FEW, (end - row + 1) / 2 * 2), r, {begin, row, group, K, width, pairs});
        near_product(weights, rows, width, even(begin + rows), r.keys_paired.data(), whole * GROUP, K / GROUP,
                     put_floats(dqueries, K));
        unrotate_rows(
            raw, {begin, end}, K, query_rotary(s, w, q, 1), [=](int64_t t) { return dqueries + (t - begin) * K; }, GROUP,
            by.q_norm, dqkv + head * K, s.qkv());
    }
    add_outer<true>(r.p_pairs.data(), whole, r.given_paired.data(), K, pairs, r.dvalues.data());
    add_outer<true>(r.ds_pairs.data(), whole, r.queries_paired.data(), K, pairs, r.dkeys.data());
}

// given: gradient of `attended` -> dqkv, bfloat16; gradients of the gains are added to `by`
void attend_backward(const Shape& s, const Weights& w, const Weights& by, const Sequence& q, HeadRoom& r,
                     const Bf16* qkv, const Bf16* attended, const float* lse, const Bf16* given, Bf16* dqkv) {
    const int64_t K = s.head_dim, L = q.length, whole = whole_groups(L), shared = s.heads / s.kv_heads;
    note_keys(q, r.real);
    for (int64_t kv = 0; kv < s.kv_heads; kv++) {
        const Rows raw = head_of(qkv, s.heads + kv, L, K);
        Bf16* keys = room(r.keys, L * K);
        rotate_rows(raw, L, K, key_rotary(s, w, q, 1), keys);
        pack_rows(in_rows(keys, K), L, K, room(r.by_rows, whole * K));
        pair_rows(in_rows(keys, K), L, whole / 2, K, room(r.keys_paired, whole * K), whole / 2);
        pack_rows(head_of(qkv, s.heads + s.kv_heads + kv, L, K), L, K, room(r.values_packed, whole * K));
        float* dkeys = room(r.dkeys, whole * K);
        std::fill_n(dkeys, whole * K, 0.0f);
        std::fill_n(room(r.dvalues, whole * K), whole * K, 0.0f);
        for (int64_t head = kv * shared; head < (kv + 1) * shared; head++) {
            take_given(s, r, head, attended, lse, given);
            attend_head_back(s, w, by, q, r, head, qkv, dqkv);
        }
        Bf16* to = dqkv + (s.heads + kv) * K;
        unrotate_rows(
            raw, {0, L}, K, key_rotary(s, w, q, LN_2), [=](int64_t t) { return dkeys + block_row(t); }, whole * GROUP,
            by.k_norm, to, s.qkv());
        for (int64_t t = 0; t < L; t++)
            for (int64_t k = 0; k < K; k += GROUP) {
                const float* from = r.dvalues.data() + block_row(t) + k * whole;
                store_line(to + s.kv_heads * K + t * s.qkv() + k, load(from), load(from + 16));
            }
    }
}

}  // namespace
