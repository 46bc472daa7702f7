// Causal attention of one sequence, forward and backward, for dalle/train_native.cpp.

#pragma once

#include <limits>

#include "train_parts.h"

namespace {

struct Sequence {  // what its heads look at
    int64_t length;
    const float *cosine, *sine;  // (L, K)
    const float* bias;           // (L): 0, or -inf where a key is padding; or null
};

struct HeadRoom {                                                     // of a thread; L' is the length in whole groups
    Halves queries, keys, values, by_rows, by_pairs, weights, given;  // by_rows: keys packed, by_pairs: values paired
    Halves keys_paired, values_packed, queries_paired, given_paired, p_pairs, ds_pairs;
    Floats scores, slopes, few, dkeys, dvalues, dqueries, norms, delta;
};

// A head of qkv, of which 32 numbers of all places lie together: (H + 2 H_kv) K / 32, L, 32
Rows head_of(const Bf16* qkv, int64_t head, int64_t length, int64_t width) {
    return {qkv + head * width * length, GROUP, length * GROUP};
}

// Queries or keys of a head, normed and turned: (L, K) bfloat16
void turn_heads(const Shape& s, const Sequence& q, Rows raw, const float* gain, float factor, Floats& few, Bf16* to) {
    for (int64_t t = 0; t < q.length; t++) {
        const int64_t at = t * s.head_dim;
        turn_head(raw, t, gain, q.cosine + at, q.sine + at, s.head_dim, s.head_eps, factor, room(few, s.head_dim),
                  to + at);
    }
}

// Scores of 16 keys, -inf where `row` may not look
__m512 scores_at(const Sequence& q, const float* scores, int64_t row, int64_t key) {
    if (!q.bias && key + 16 <= row + 1) return _mm512_loadu_ps(scores + key);
    const int64_t left = std::min(row + 1, q.length) - key;
    const __mmask16 seen = left >= 16 ? 0xffff : left <= 0 ? 0 : (1 << left) - 1;
    __m512 found = _mm512_mask_loadu_ps(_mm512_set1_ps(-std::numeric_limits<float>::infinity()), seen, scores + key);
    return q.bias ? _mm512_mask_add_ps(found, seen, found, _mm512_maskz_loadu_ps(seen, q.bias + key)) : found;
}

// exp(x) for x <= 0, to the few digits that bfloat16 has; 0 below -104
__m512 exp_few(__m512 x) {
    x = _mm512_mul_ps(_mm512_max_ps(x, _mm512_set1_ps(-150.0f)), _mm512_set1_ps(1.44269504f));
    const __m512 n = _mm512_roundscale_ps(x, 0), r = _mm512_sub_ps(x, n);  // 2^x = 2^n 2^r
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(9.6181291e-3f), r, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9314718e-1f));
    return _mm512_scalef_ps(_mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f)), n);
}

// exp(scores - their maximum) of keys up to `row` in bfloat16, 0 beyond; -> the logarithm of the softmax's sum, and 1 /
// sum
float soften(const Sequence& q, const float* scores, int64_t row, int64_t width, Bf16* weights, float& inverse) {
    __m512 most = _mm512_set1_ps(-std::numeric_limits<float>::infinity()), total = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += 16) most = _mm512_max_ps(most, scores_at(q, scores, row, i));
    const float top = _mm512_reduce_max_ps(most);
    for (int64_t i = 0; i < width; i += 16) {
        const __m512 p = exp_few(_mm512_sub_ps(scores_at(q, scores, row, i), _mm512_set1_ps(top)));
        store_bf16(weights + i, p);
        total = _mm512_add_ps(total, p);
    }
    const float sum = _mm512_reduce_add_ps(total);
    inverse = 1 / sum;
    return top + std::log(sum);
}

auto put_floats(float* to, int64_t width) {
    return [=](int64_t row, int64_t n, __m512 first, __m512 last) {
        _mm512_storeu_ps(to + row * width + n, first);
        _mm512_storeu_ps(to + row * width + n + 16, last);
    };
}

// softmax(q k^T) v of all heads: qkv ((H + 2 H_kv) K / 32, L, 32) -> attended (L, H K), lse (H, L)
void attend_forward(const Shape& s, const Weights& w, const Sequence& q, HeadRoom& r, const Bf16* qkv, Bf16* attended,
                    float* lse) {
    const int64_t K = s.head_dim, L = q.length, whole = whole_groups(L), shared = s.heads / s.kv_heads;
    Bf16 *queries = room(r.queries, L * K), *keys = room(r.keys, L * K);
    float* scores = room(r.scores, MAX_TILE * whole);
    for (int64_t head = 0; head < s.heads; head++) {
        const int64_t kv = head / shared;
        if (head % shared == 0) {
            turn_heads(s, q, head_of(qkv, s.heads + kv, L, K), w.k_norm, 1, r.few, keys);
            pack_rows(in_rows(keys, K), L, K, room(r.by_rows, whole * K));
            const Rows values = head_of(qkv, s.heads + s.kv_heads + kv, L, K);
            pair_rows(values, L, whole / 2, K, room(r.by_pairs, whole * K), whole / 2);
        }
        turn_heads(s, q, head_of(qkv, head, L, K), w.q_norm, 1 / std::sqrt(static_cast<float>(K)), r.few, queries);
        for (int64_t begin = 0; begin < L; begin += MAX_TILE) {
            const int64_t rows = std::min(MAX_TILE, L - begin), width = whole_groups(begin + rows);
            product(queries + begin * K, rows, K, K, r.by_rows.data(), K * GROUP, width / GROUP,
                    put_floats(scores, width));
            float inverse[MAX_TILE];
            Bf16* weights = room(r.weights, MAX_TILE * whole);
            for (int64_t i = 0; i < rows; i++)
                lse[head * L + begin + i] =
                    soften(q, scores + i * width, begin + i, width, weights + i * width, inverse[i]);
            product(weights, rows, width, width, r.by_pairs.data(), whole * GROUP, K / GROUP,
                    [&](int64_t i, int64_t k, __m512 first, __m512 last) {
                        Bf16* to = attended + (begin + i) * s.inner() + head * K + k;
                        store_line(to, _mm512_mul_ps(first, _mm512_set1_ps(inverse[i])),
                                   _mm512_mul_ps(last, _mm512_set1_ps(inverse[i])));
                    });
        }
    }
}

// Two rows of probabilities and of their gradients, from `scores` and `slopes` = dO v^T, in bfloat16: rows of ds for a
// product, and both as paired rows. The second row may be missing.
void soften_back(const Sequence& q, HeadRoom& r, const float* lse, int64_t begin, int64_t i, int64_t rows,
                 int64_t width, int64_t pairs) {
    const int64_t row = begin + i;
    const bool both = i + 1 < rows;
    const float *scores = r.scores.data() + i * width, *slopes = r.slopes.data() + i * width;
    for (int64_t k = 0; k < width; k += 16) {
        __m512 p[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()}, ds[2] = {p[0], p[0]};
        for (int64_t j = 0; j < 1 + both; j++) {
            const __m512 above = _mm512_set1_ps(lse[row + j]), delta = _mm512_set1_ps(r.delta[row + j]);
            p[j] = exp_few(_mm512_sub_ps(scores_at(q, scores + j * width, row + j, k), above));
            ds[j] = _mm512_mul_ps(p[j], _mm512_sub_ps(_mm512_loadu_ps(slopes + j * width + k), delta));
            store_bf16(r.weights.data() + (i + j) * width + k, ds[j]);
        }
        const auto pair = [](const __m512(&x)[2]) {
            const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x[0]));
            return _mm512_or_si512(low,
                                   _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x[1])), 16));
        };
        const int64_t at = ((k / GROUP * pairs + row / 2) * GROUP + k % GROUP) * 2;
        _mm512_storeu_si512(r.p_pairs.data() + at, pair(p));
        _mm512_storeu_si512(r.ds_pairs.data() + at, pair(ds));
    }
}

// A query head: dq into qkv's gradient, and what it adds to dkeys and dvalues, in blocks as `add_outer` has them
void attend_head_back(const Shape& s, const Weights& w, const Weights& by, const Sequence& q, HeadRoom& r, int64_t head,
                      const Bf16* qkv, const Bf16* attended, const float* lse, const Bf16* given, Bf16* dqkv) {
    const int64_t K = s.head_dim, L = q.length, whole = whole_groups(L), pairs = (L + 1) / 2;
    const float factor = 1 / std::sqrt(static_cast<float>(K));
    float *scores = room(r.scores, MAX_TILE * whole), *slopes = room(r.slopes, MAX_TILE * whole);
    float *dqueries = room(r.dqueries, MAX_TILE * K), *delta = room(r.delta, L);
    Bf16 *queries = room(r.queries, L * K), *weights = room(r.weights, MAX_TILE * whole);
    room(r.p_pairs, pairs * whole * 2), room(r.ds_pairs, pairs * whole * 2);
    const Rows raw = head_of(qkv, head, L, K);
    turn_heads(s, q, raw, w.q_norm, factor, r.few, queries);
    pair_rows(in_rows(queries, K), L, pairs, K, room(r.queries_paired, pairs * K * 2), pairs);
    pair_rows(in_rows(given + head * K, s.inner()), L, pairs, K, room(r.given_paired, pairs * K * 2), pairs);
    for (int64_t t = 0; t < L; t++) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t k = head * K; k < (head + 1) * K; k += 16)
            sum = _mm512_fmadd_ps(widen(given + t * s.inner() + k), widen(attended + t * s.inner() + k), sum);
        delta[t] = _mm512_reduce_add_ps(sum);
    }
    for (int64_t begin = 0; begin < L; begin += MAX_TILE) {
        const int64_t rows = std::min(MAX_TILE, L - begin), width = whole_groups(begin + rows);
        product(queries + begin * K, rows, K, K, r.by_rows.data(), K * GROUP, width / GROUP, put_floats(scores, width));
        product(given + begin * s.inner() + head * K, rows, s.inner(), K, r.values_packed.data(), K * GROUP,
                width / GROUP, put_floats(slopes, width));
        for (int64_t i = 0; i < rows; i += 2) soften_back(q, r, lse + head * L, begin, i, rows, width, pairs);
        product(weights, rows, width, width, r.keys_paired.data(), whole * GROUP, K / GROUP, put_floats(dqueries, K));
        for (int64_t i = 0; i < rows; i++) {
            const int64_t t = begin + i;
            unturn_head(raw, t, w.q_norm, q.cosine + t * K, q.sine + t * K, K, s.head_eps, factor, room(r.few, 3 * K),
                        dqueries + i * K, GROUP, by.q_norm, dqkv + t * s.qkv() + head * K);
        }
    }
    add_outer<true>(r.p_pairs.data(), whole, r.given_paired.data(), K, pairs, r.dvalues.data());
    add_outer<true>(r.ds_pairs.data(), whole, r.queries_paired.data(), K, pairs, r.dkeys.data());
}

// given: gradient of `attended` -> dqkv, bfloat16; gradients of the gains are added to `by`
void attend_backward(const Shape& s, const Weights& w, const Weights& by, const Sequence& q, HeadRoom& r,
                     const Bf16* qkv, const Bf16* attended, const float* lse, const Bf16* given, Bf16* dqkv) {
    const int64_t K = s.head_dim, L = q.length, whole = whole_groups(L), shared = s.heads / s.kv_heads;
    for (int64_t kv = 0; kv < s.kv_heads; kv++) {
        const Rows raw = head_of(qkv, s.heads + kv, L, K);
        Bf16* keys = room(r.keys, L * K);
        turn_heads(s, q, raw, w.k_norm, 1, r.few, keys);
        pack_rows(in_rows(keys, K), L, K, room(r.by_rows, whole * K));
        pair_rows(in_rows(keys, K), L, whole / 2, K, room(r.keys_paired, whole * K), whole / 2);
        pack_rows(head_of(qkv, s.heads + s.kv_heads + kv, L, K), L, K, room(r.values_packed, whole * K));
        std::fill_n(room(r.dkeys, whole * K), whole * K, 0.0f);
        std::fill_n(room(r.dvalues, whole * K), whole * K, 0.0f);
        for (int64_t head = kv * shared; head < (kv + 1) * shared; head++)
            attend_head_back(s, w, by, q, r, head, qkv, attended, lse, given, dqkv);
        for (int64_t t = 0; t < L; t++) {
            Bf16* to = dqkv + t * s.qkv() + (s.heads + kv) * K;
            unturn_head(raw, t, w.k_norm, q.cosine + t * K, q.sine + t * K, K, s.head_eps, 1, room(r.few, 3 * K),
                        r.dkeys.data() + block_row(t), whole * GROUP, by.k_norm, to);
            for (int64_t k = 0; k < K; k += 16)
                store_bf16(to + s.kv_heads * K + k,
                           _mm512_loadu_ps(r.dvalues.data() + block_row(t) + k / GROUP * whole * GROUP + k % GROUP));
        }
    }
}

}  // namespace
