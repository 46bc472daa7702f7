// One decode step of the generator in one call: what dalle/packed.py computes, without an operator for each line of it.
//
// All threads go through the layers together and wait for each other five times a layer. A thread owns columns of each
// matrix product, or heads of the attention, so results do not depend on the number of threads; every row of a product
// is summed in the same order however many rows there are, so a picture does not depend on its company.
//
// Weights: see common/avx512.h. Keys: blocks of 16 positions, transposed: (L / 16, K, 16), float16. Values: (L, K),
// float16.

#include "avx512.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace {

using Half = uint16_t;

constexpr int64_t BLOCK = 16;  // positions of a block of keys
constexpr int64_t PAGE = 4096;

}  // namespace

extern "C" {

struct Linear {
    const void* weight;  // packed
    const float* scale;  // one an output where the weight is int8, else null
    int64_t inputs, outputs;
};

struct Layer {
    Linear qkv, out, gate_up, down;  // gate_up: 16 gates and their 16 factors take turns
};

struct Model {
    const Layer* layers;
    Linear head;
    const float* image_embed;  // (V, D)
    const float* turns;        // (layers, 2, positions, 2, K): rotary tables with gains, of queries and of keys
    int64_t num_layers, dim, num_heads, num_kv_heads, head_dim, num_positions;
    float eps, head_eps;  // times D and K
};

struct Cache {
    Half *keys, *values;     // (layers, R H_kv, ...)
    const float* bias;       // (R, L): 0, or -inf where a key is padding
    float *x, *qkv;          // (R, D), (R, (H + 2 H_kv) K)
    Bf16 *attended, *gated;  // (R, H K), (R, N / 2 of gate_up)
    int64_t rows, length, num_blocks;
};

}  // extern "C"

namespace {

__m512 load_half(const Half* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

// --- matrix products ----------------------------------------------------------------------------------------------

// Rows of a (R, K) against a group: store(row, first 16 sums, last 16 sums).
template <int R, typename Weight, typename Store>
[[gnu::flatten]] void multiply_tile(const Bf16* a, int64_t inputs, const Weight* group, int64_t row, const Store& store,
                                    Ahead ahead) {
    __m512 sums[R][2];
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    accumulate<R>(sums, a + row * inputs, inputs, inputs, group, ahead);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) store(row + r, sums[r][0], sums[r][1]);
}

template <int R, typename Weight, typename Store>
void multiply_rows(int64_t n, const Bf16* a, int64_t inputs, const Weight* group, int64_t row, const Store& store,
                   Ahead ahead) {
    if (n == R) return multiply_tile<R>(a, inputs, group, row, store, ahead);
    if constexpr (R > 1) multiply_rows<R - 1>(n, a, inputs, group, row, store, ahead);
}

// Outputs of groups `range` for all rows: store(row, first output, its 16 sums, the next 16 sums).
template <typename Store>
void multiply(const Linear& l, const Bf16* a, int64_t rows, Range range, const Store& store) {
    static thread_local std::vector<Bf16> own;
    std::vector<Bf16>& widened = once(own);
    const int64_t size = l.inputs * GROUP;
    for (int64_t g = range.begin; g < range.end; g++) {
        __m512 low = _mm512_set1_ps(1.0f), high = low;
        if (l.scale) {
            low = _mm512_loadu_ps(l.scale + g * GROUP);
            high = _mm512_loadu_ps(l.scale + g * GROUP + 16);
        }
        const auto scaled = [&](int64_t row, __m512 first, __m512 last) {
            if (l.scale) first = _mm512_mul_ps(first, low), last = _mm512_mul_ps(last, high);
            store(row, g * GROUP, first, last);
        };
        const int64_t bytes = size * (l.scale ? sizeof(int8_t) : sizeof(Bf16));
        const char* weight = static_cast<const char*>(l.weight) + g * bytes;
        const Ahead page_ahead{weight + PAGE, 2 * bytes / l.inputs};
        const auto group_ahead = [&](int64_t tile, int64_t tiles) {  // each tile brings its part of the next group
            return Ahead{weight + bytes + bytes * tile / tiles, 2 * bytes / l.inputs / tiles};
        };
        const Bf16* group = reinterpret_cast<const Bf16*>(weight);
        if (l.scale) {
            const int8_t* narrow = reinterpret_cast<const int8_t*>(weight);
            if (rows <= 2) {
                multiply_rows<2>(rows, a, l.inputs, narrow, 0, scaled, page_ahead);
                continue;
            }
            widened.resize(size);
            for (int64_t i = 0; i < size; i += GROUP) _mm512_storeu_si512(&widened[i], (__m512i)load_pairs(narrow + i));
            group = widened.data();
        }
        const int64_t tiles = (rows + MAX_TILE - 1) / MAX_TILE;
        for (int64_t t = 0; t < tiles; t++) {
            const Range tile = share(rows, t, tiles);
            const Ahead ahead = tiles == 1 && !l.scale ? page_ahead : group_ahead(t, tiles);
            multiply_rows<MAX_TILE>(tile.end - tile.begin, a, l.inputs, group, tile.begin, scaled, ahead);
        }
    }
}

int64_t num_groups(const Linear& l) { return (l.outputs + GROUP - 1) / GROUP; }

void multiply_into(const Linear& l, const Bf16* a, int64_t rows, float* y, Range range) {
    multiply(l, a, rows, range, [&](int64_t row, int64_t n, __m512 first, __m512 last) {
        float* to = y + row * l.outputs + n;
        const int64_t left = l.outputs - n;
        _mm512_mask_storeu_ps(to, left >= 16 ? 0xffff : (1 << left) - 1, first);
        if (left > 16) _mm512_mask_storeu_ps(to + 16, left >= 32 ? 0xffff : (1 << (left - 16)) - 1, last);
    });
}

void add_product(const Linear& l, const Bf16* a, int64_t rows, float* x, Range range) {
    multiply(l, a, rows, range, [&](int64_t row, int64_t n, __m512 first, __m512 last) {
        float* to = x + row * l.outputs + n;
        _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), first));
        _mm512_storeu_ps(to + 16, _mm512_add_ps(_mm512_loadu_ps(to + 16), last));
    });
}

void multiply_gated(const Linear& l, const Bf16* a, int64_t rows, Bf16* y, Range range) {
    multiply(l, a, rows, range, [&](int64_t row, int64_t n, __m512 gate, __m512 factor) {
        store_bf16(y + row * (l.outputs / 2) + n / 2, _mm512_mul_ps(silu512(gate), factor));
    });
}

// --- norms and attention ------------------------------------------------------------------------------------------

// x / sqrt(|x|^2 + eps) of every row, in bfloat16
void norm(const float* x, Bf16* y, int64_t rows, int64_t dim, float eps) {
    for (int64_t row = 0; row < rows; row++, x += dim, y += dim) {
        __m512 squares = _mm512_setzero_ps();
        for (int64_t i = 0; i < dim; i += 16) {
            const __m512 part = _mm512_loadu_ps(x + i);
            squares = _mm512_fmadd_ps(part, part, squares);
        }
        const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) + eps));
        for (int64_t i = 0; i < dim; i += 16) store_bf16(y + i, _mm512_mul_ps(_mm512_loadu_ps(x + i), scale));
    }
}

// A head normed and turned: head (K), plain and rolled tables (K) -> y (K)
void turn(const float* head, const float* plain, const float* rolled, int64_t width, float eps, float* y) {
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += 16) {
        const __m512 part = _mm512_loadu_ps(head + i);
        squares = _mm512_fmadd_ps(part, part, squares);
    }
    const float scale = 1.0f / std::sqrt(_mm512_reduce_add_ps(squares) + eps);
    const int64_t half = width / 2;
    for (int64_t i = 0; i < half; i++) {
        y[i] = (head[i] * plain[i] + head[i + half] * rolled[i]) * scale;
        y[i + half] = (head[i + half] * plain[i + half] + head[i] * rolled[i + half]) * scale;
    }
}

// Scores of N blocks of keys: q (K), keys (N, K, 16) -> scores (N, 16); brings as many bytes from `ahead` on
template <int N>
void score_blocks(const float* q, const Half* keys, int64_t width, const Half* ahead, float* scores) {
    __m512 sums[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) sums[n] = _mm512_setzero_ps();
    for (int64_t k = 0; k < width; k++) {
        for (int n = 0; n < N; n += 2) _mm_prefetch(ahead + (k * N + n) * BLOCK, _MM_HINT_T0);
        const __m512 factor = _mm512_set1_ps(q[k]);
#pragma GCC unroll 4
        for (int n = 0; n < N; n++)
            sums[n] = _mm512_fmadd_ps(factor, load_half(keys + (n * width + k) * BLOCK), sums[n]);
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) _mm512_storeu_ps(scores + n * BLOCK, sums[n]);
}

// N x 16 channels of the weighted sum of values (length, K); even and odd positions are summed apart
template <int N>
void sum_values(const float* p, const Half* values, int64_t length, int64_t width, const Half* ahead, __m512 scale,
                Bf16* y) {
    __m512 even[N], odd[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) even[n] = odd[n] = _mm512_setzero_ps();
    for (int64_t i = 0; i < length; i += 2) {  // p and values are 0 right beyond the length
        for (int n = 0; n < N; n++) _mm_prefetch(ahead + (i * N + n * 2) * 16, _MM_HINT_T0);
        const __m512 first = _mm512_set1_ps(p[i]), second = _mm512_set1_ps(p[i + 1]);
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) {
            even[n] = _mm512_fmadd_ps(first, load_half(values + i * width + n * 16), even[n]);
            odd[n] = _mm512_fmadd_ps(second, load_half(values + (i + 1) * width + n * 16), odd[n]);
        }
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) store_bf16(y + n * 16, _mm512_mul_ps(_mm512_add_ps(even[n], odd[n]), scale));
}

// softmax(q k^T + bias) v of one query: scores is room for whole blocks
void attend(const float* q, const Half* keys, const Half* values, const Half* next_keys, const float* bias,
            int64_t length, int64_t width, float* scores, Bf16* y) {
    const int64_t blocks = (length + BLOCK - 1) / BLOCK;
    int64_t b = 0;
    for (; b + 4 <= blocks; b += 4)
        score_blocks<4>(q, keys + b * width * BLOCK, width, values + b * width * BLOCK, scores + b * BLOCK);
    for (; b < blocks; b++)
        score_blocks<1>(q, keys + b * width * BLOCK, width, values + b * width * BLOCK, scores + b * BLOCK);
    const __m512 nothing = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    __m512 most = nothing, total = _mm512_setzero_ps();
    for (int64_t i = 0; i < length; i += 16) {
        const __mmask16 there = length - i >= 16 ? 0xffff : (1 << (length - i)) - 1;
        const __m512 biased = _mm512_add_ps(_mm512_loadu_ps(scores + i), _mm512_maskz_loadu_ps(there, bias + i));
        const __m512 seen = _mm512_mask_mov_ps(nothing, there, biased);
        _mm512_storeu_ps(scores + i, seen);
        most = _mm512_max_ps(most, seen);
    }
    most = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    for (int64_t i = 0; i < length; i += 16) {
        const __m512 p = exp512(_mm512_sub_ps(_mm512_loadu_ps(scores + i), most));
        _mm512_storeu_ps(scores + i, p);
        total = _mm512_add_ps(total, p);
    }
    const __m512 scale = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(total));
    int64_t i = 0;
    for (; i + 64 <= width; i += 64)
        sum_values<4>(scores, values + i, length, width, next_keys + i * length, scale, y + i);
    for (; i < width; i += 16) sum_values<1>(scores, values + i, length, width, next_keys + i * length, scale, y + i);
}

// Keys and values of kv heads `tasks` go into the cache, and their queries look at it.
void attend_heads(const Model& m, const Cache& c, int64_t layer, int64_t row_of_turns, int64_t index, Range tasks) {
    static thread_local std::vector<float> own;
    std::vector<float>& room = once(own);
    const int64_t width = m.head_dim, stored = c.rows * m.num_kv_heads, share_of_keys = m.num_heads / m.num_kv_heads;
    room.resize(c.num_blocks * BLOCK + width);
    float *scores = room.data() + width, *turned = room.data();
    const float* plain = m.turns + ((layer * 2) * m.num_positions + row_of_turns) * 2 * width;
    const float* rolled = plain + m.num_positions * 2 * width;
    for (int64_t task = tasks.begin; task < tasks.end; task++) {
        const int64_t row = task / m.num_kv_heads, head = task % m.num_kv_heads;
        const float* heads = c.qkv + row * (m.num_heads + 2 * m.num_kv_heads) * width;
        Half* keys = c.keys + (layer * stored + task) * c.num_blocks * width * BLOCK;
        Half* values = c.values + (layer * stored + task) * (c.length + 1) * width;
        turn(heads + (m.num_heads + head) * width, plain + width, rolled + width, width, m.head_eps, turned);
        Half* key = keys + index / BLOCK * width * BLOCK + index % BLOCK;
        for (int64_t k = 0; k < width; k++) key[k * BLOCK] = _cvtss_sh(turned[k], 0);
        const float* value = heads + (m.num_heads + m.num_kv_heads + head) * width;
        for (int64_t k = 0; k < width; k += 16) {
            __m256i* to = reinterpret_cast<__m256i*>(values + index * width + k);
            _mm256_storeu_si256(to, _mm512_cvtps_ph(_mm512_loadu_ps(value + k), 0));
            _mm256_storeu_si256(to + width / 16, _mm256_setzero_si256());  // the next may be read with weight 0
        }
        for (int64_t i = head * share_of_keys; i < (head + 1) * share_of_keys; i++) {
            turn(heads + i * width, plain, rolled, width, m.head_eps, turned);
            attend(turned, keys, values, keys + c.num_blocks * width * BLOCK, c.bias + row * c.length, index + 1, width,
                   scores, c.attended + (row * m.num_heads + i) * width);
        }
    }
}

}  // namespace

// --- what Python calls --------------------------------------------------------------------------------------------

extern "C" {

// y = a @ weight.T: a (rows, K) bfloat16 -> y (rows, N) float32
void linear(const Linear* l, const Bf16* a, int64_t rows, float* y, int threads) {
#pragma omp parallel num_threads(threads)
    multiply_into(*l, a, rows, y, share(num_groups(*l), omp_get_thread_num(), omp_get_num_threads()));
}

// y = silu(a @ gate.T) * (a @ up.T): y (rows, N / 2) bfloat16
void gated(const Linear* l, const Bf16* a, int64_t rows, Bf16* y, int threads) {
#pragma omp parallel num_threads(threads)
    multiply_gated(*l, a, rows, y, share(num_groups(*l), omp_get_thread_num(), omp_get_num_threads()));
}

// ids (R) at `index` of the cache, which turns as row `row_of_turns` says -> logits (R, V); false for an unknown id
bool step(const Model* model, const Cache* cache, const int64_t* ids, int64_t row_of_turns, int64_t index,
          float* logits, int threads) {
    const Model& m = *model;
    const Cache& c = *cache;
    if (std::any_of(ids, ids + c.rows, [&](int64_t id) { return id < 0 || id >= m.head.outputs; })) return false;
#pragma omp parallel num_threads(threads)
    {
        static thread_local std::vector<Bf16> own;  // each thread norms all rows itself: cheaper than waiting
        std::vector<Bf16>& normed = once(own);
        normed.resize(c.rows * m.dim);
        const int64_t thread = omp_get_thread_num(), all = omp_get_num_threads();
        const auto groups = [&](const Linear& l) { return share(num_groups(l), thread, all); };
        const Range rows = share(c.rows, thread, all);
        for (int64_t r = rows.begin; r < rows.end; r++)
            std::copy_n(m.image_embed + ids[r] * m.dim, m.dim, c.x + r * m.dim);
#pragma omp barrier
        for (int64_t i = 0; i < m.num_layers; i++) {
            const Layer& layer = m.layers[i];
            norm(c.x, normed.data(), c.rows, m.dim, m.eps);
            multiply_into(layer.qkv, normed.data(), c.rows, c.qkv, groups(layer.qkv));
#pragma omp barrier
            attend_heads(m, c, i, row_of_turns, index, share(c.rows * m.num_kv_heads, thread, all));
#pragma omp barrier
            add_product(layer.out, c.attended, c.rows, c.x, groups(layer.out));
#pragma omp barrier
            norm(c.x, normed.data(), c.rows, m.dim, m.eps);
            multiply_gated(layer.gate_up, normed.data(), c.rows, c.gated, groups(layer.gate_up));
#pragma omp barrier
            add_product(layer.down, c.gated, c.rows, c.x, groups(layer.down));
#pragma omp barrier
        }
        norm(c.x, normed.data(), c.rows, m.dim, m.eps);
        multiply_into(m.head, normed.data(), c.rows, logits, groups(m.head));
    }
    return true;
}

}  // extern "C"
