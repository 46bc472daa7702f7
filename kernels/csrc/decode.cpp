// One decode step of the generator in one call, with what norms and rotary tables hold folded into the weights.
//
// All threads go through the layers together and wait for each other five times a layer. A thread owns columns of each
// matrix product, or heads of the attention, so results do not depend on the number of threads; every row of a product
// is summed in the same order however many rows there are, so a picture does not depend on its company.
//
// Weights: see kernels.h. Keys: blocks of 16 positions, transposed: (L / 16, K, 16), float16. Values: (L, K),
// float16.

#include "abi.h"
#include "team.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace {

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
    const float* rotary_tables; // (layers, 2, positions, 2, K): with gains, of queries and of keys
    int64_t num_layers, dim, num_heads, num_kv_heads, head_dim, num_positions;
    float eps, head_eps;  // times D and K
};

struct Cache {
    Half *keys, *values;     // (layers, C H_kv, ...) for C rows at most
    const float* bias;       // (C, L): 0, or -inf where a key is padding
    float *x, *qkv;          // (C, D), (C, (H + 2 H_kv) K)
    Bf16 *attended, *gated;  // (C, H K), (C, N / 2 of gate_up)
    int64_t capacity, length, num_blocks;
};

// The first `count` rows of a cache and the image index of each; stride 0: all rows stand at the same.
struct Rows {
    const int64_t* positions;
    int64_t stride, count, num_image;

    int64_t position(int64_t row) const { return positions[row * stride]; }
};

}  // extern "C"

EXPORT_ABI(sizeof(Linear), sizeof(Layer), sizeof(Model), sizeof(Cache), sizeof(Rows))

namespace {

// --- matrix products ----------------------------------------------------------------------------------------------

// Rows of a (R, K) against a group: store(row, first 16 sums, last 16 sums).
template <int R, typename Weight, typename Store>
[[gnu::flatten]] void multiply_tile(const Bf16* a, int64_t inputs, const Weight* group, int64_t row, const Store& store,
                                    Ahead ahead) {
    Lanes sums[R][2];
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) sums[r][0] = sums[r][1] = zeros();
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
        Lanes low = fill(1.0f), high = low;
        if (l.scale) {
            low = load(l.scale + g * GROUP);
            high = load(l.scale + g * GROUP + 16);
        }
        const auto scaled = [&](int64_t row, Lanes first, Lanes last) {
            if (l.scale) first = mul(first, low), last = mul(last, high);
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
            for (int64_t i = 0; i < size; i += GROUP) put_line(&widened[i], load_line(narrow + i));
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
    multiply(l, a, rows, range, [&](int64_t row, int64_t n, Lanes first, Lanes last) {
        float* to = y + row * l.outputs + n;
        const int64_t left = l.outputs - n;
        put_some(to, first_lanes(left), first);
        if (left > 16) put_some(to + 16, first_lanes(left - 16), last);
    });
}

void add_product(const Linear& l, const Bf16* a, int64_t rows, float* x, Range range) {
    multiply(l, a, rows, range, [&](int64_t row, int64_t n, Lanes first, Lanes last) {
        float* to = x + row * l.outputs + n;
        put16(to, add(load(to), first));
        put16(to + 16, add(load(to + 16), last));
    });
}

void multiply_gated(const Linear& l, const Bf16* a, int64_t rows, Bf16* y, Range range) {
    multiply(l, a, rows, range, [&](int64_t row, int64_t n, Lanes gate, Lanes factor) {
        store_bf16(y + row * (l.outputs / 2) + n / 2, mul(silu16(gate), factor));
    });
}

// --- norms and attention ------------------------------------------------------------------------------------------

// x / sqrt(|x|^2 + eps) of every row, in bfloat16
void norm(const float* x, Bf16* y, int64_t rows, int64_t dim, float eps) {
    for (int64_t row = 0; row < rows; row++, x += dim, y += dim) {
        Lanes squares = zeros();
        for (int64_t i = 0; i < dim; i += 16) {
            const Lanes part = load(x + i);
            squares = fmadd(part, part, squares);
        }
        const Lanes scale = fill(1.0f / std::sqrt(sum_of(squares) + eps));
        for (int64_t i = 0; i < dim; i += 16) store_bf16(y + i, mul(load(x + i), scale));
    }
}

// A head normed and turned: head (K), plain and rolled tables (K) -> y (K)
void turn(const float* head, const float* plain, const float* rolled, int64_t width, float eps, float* y) {
    Lanes squares = zeros();
    for (int64_t i = 0; i < width; i += 16) {
        const Lanes part = load(head + i);
        squares = fmadd(part, part, squares);
    }
    const float scale = 1.0f / std::sqrt(sum_of(squares) + eps);
    const int64_t half = width / 2;
    for (int64_t i = 0; i < half; i++) {
        y[i] = (head[i] * plain[i] + head[i + half] * rolled[i]) * scale;
        y[i + half] = (head[i + half] * plain[i + half] + head[i] * rolled[i + half]) * scale;
    }
}

// Scores of N blocks of keys: q (K), keys (N, K, 16) -> scores (N, 16); brings as many bytes from `ahead` on
template <int N>
void score_blocks(const float* q, const Half* keys, int64_t width, const Half* ahead, float* scores) {
    Lanes sums[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) sums[n] = zeros();
    for (int64_t k = 0; k < width; k++) {
        for (int n = 0; n < N; n += 2) _mm_prefetch(ahead + (k * N + n) * BLOCK, _MM_HINT_T0);
        const Lanes factor = fill(q[k]);
#pragma GCC unroll 4
        for (int n = 0; n < N; n++)
            sums[n] = fmadd(factor, load_half(keys + (n * width + k) * BLOCK), sums[n]);
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) put16(scores + n * BLOCK, sums[n]);
}

// N x 16 channels of the weighted sum of values (length, K); even and odd positions are summed apart
template <int N>
void sum_values(const float* p, const Half* values, int64_t length, int64_t width, const Half* ahead, Lanes scale,
                Bf16* y) {
    Lanes even[N], odd[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) even[n] = odd[n] = zeros();
    for (int64_t i = 0; i < length; i += 2) {  // p and values are 0 right beyond the length
        for (int n = 0; n < N; n++) _mm_prefetch(ahead + (i * N + n * 2) * 16, _MM_HINT_T0);
        const Lanes first = fill(p[i]), second = fill(p[i + 1]);
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) {
            even[n] = fmadd(first, load_half(values + i * width + n * 16), even[n]);
            odd[n] = fmadd(second, load_half(values + (i + 1) * width + n * 16), odd[n]);
        }
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) store_bf16(y + n * 16, mul(add(even[n], odd[n]), scale));
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
    const Lanes nothing = fill(-std::numeric_limits<float>::infinity());
    Lanes most = nothing, total = zeros();
    for (int64_t i = 0; i < length; i += 16) {
        const Mask there = first_lanes(length - i);
        const Lanes biased = add(load(scores + i), load_some(there, bias + i, zeros()));
        const Lanes seen = pick(there, biased, nothing);
        put16(scores + i, seen);
        most = larger(most, seen);
    }
    most = fill(most_of(most));
    for (int64_t i = 0; i < length; i += 16) {
        const Lanes p = exp16(sub(load(scores + i), most));
        put16(scores + i, p);
        total = add(total, p);
    }
    const Lanes scale = fill(1.0f / sum_of(total));
    int64_t i = 0;
    for (; i + 64 <= width; i += 64)
        sum_values<4>(scores, values + i, length, width, next_keys + i * length, scale, y + i);
    for (; i < width; i += 16) sum_values<1>(scores, values + i, length, width, next_keys + i * length, scale, y + i);
}

// Keys and values of kv heads `tasks` go into the cache, and their queries look at it.
void attend_heads(const Model& m, const Cache& c, const Rows& rows, int64_t layer, Range tasks) {
    static thread_local std::vector<float> own;
    std::vector<float>& room = once(own);
    const int64_t width = m.head_dim, stored = c.capacity * m.num_kv_heads;
    const int64_t share_of_keys = m.num_heads / m.num_kv_heads;
    room.resize(c.num_blocks * BLOCK + width);
    float *scores = room.data() + width, *turned = room.data();
    for (int64_t task = tasks.begin; task < tasks.end; task++) {
        const int64_t row = task / m.num_kv_heads, head = task % m.num_kv_heads;
        const int64_t from_end = rows.position(row) - rows.num_image;
        const int64_t index = c.length + from_end + 1;  // of the cache
        const float* plain = m.rotary_tables + ((layer * 2 + 1) * m.num_positions + from_end) * 2 * width;
        const float* rolled = plain + m.num_positions * 2 * width;
        const float* heads = c.qkv + row * (m.num_heads + 2 * m.num_kv_heads) * width;
        Half* keys = c.keys + (layer * stored + task) * c.num_blocks * width * BLOCK;
        Half* values = c.values + (layer * stored + task) * (c.length + 1) * width;
        turn(heads + (m.num_heads + head) * width, plain + width, rolled + width, width, m.head_eps, turned);
        Half* key = keys + index / BLOCK * width * BLOCK + index % BLOCK;
        for (int64_t k = 0; k < width; k++) key[k * BLOCK] = _cvtss_sh(turned[k], 0);
        const float* value = heads + (m.num_heads + m.num_kv_heads + head) * width;
        for (int64_t k = 0; k < width; k += 16) {
            put_half(values + index * width + k, load(value + k));
            put_half(values + (index + 1) * width + k, zeros());  // the next may be read with weight 0
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
    in_parallel(threads, [&](int64_t thread, int64_t all) {
        multiply_into(*l, a, rows, y, share(num_groups(*l), thread, all));
    });
}

// y = silu(a @ gate.T) * (a @ up.T): y (rows, N / 2) bfloat16
void gated(const Linear* l, const Bf16* a, int64_t rows, Bf16* y, int threads) {
    in_parallel(threads, [&](int64_t thread, int64_t all) {
        multiply_gated(*l, a, rows, y, share(num_groups(*l), thread, all));
    });
}

// ids (R) of the tokens at the rows' positions -> logits (R, V) of the next ones; false for an unknown id
bool step(const Model* model, const Cache* cache, const Rows* which, const int64_t* ids, float* logits, int threads) {
    const Model& m = *model;
    const Cache& c = *cache;
    const int64_t count = which->count;
    if (std::any_of(ids, ids + count, [&](int64_t id) { return id < 0 || id >= m.head.outputs; })) return false;
    in_parallel(threads, [&](int64_t thread, int64_t all) {
        static thread_local std::vector<Bf16> own;  // each thread norms all rows itself: cheaper than waiting
        std::vector<Bf16>& normed = once(own);
        normed.resize(count * m.dim);
        const auto groups = [&](const Linear& l) { return share(num_groups(l), thread, all); };
        const Range rows = share(count, thread, all);
        for (int64_t r = rows.begin; r < rows.end; r++)
            std::copy_n(m.image_embed + ids[r] * m.dim, m.dim, c.x + r * m.dim);
        barrier();
        for (int64_t i = 0; i < m.num_layers; i++) {
            const Layer& layer = m.layers[i];
            norm(c.x, normed.data(), count, m.dim, m.eps);
            multiply_into(layer.qkv, normed.data(), count, c.qkv, groups(layer.qkv));
            barrier();
            attend_heads(m, c, *which, i, share(count * m.num_kv_heads, thread, all));
            barrier();
            add_product(layer.out, c.attended, count, c.x, groups(layer.out));
            barrier();
            norm(c.x, normed.data(), count, m.dim, m.eps);
            multiply_gated(layer.gate_up, normed.data(), count, c.gated, groups(layer.gate_up));
            barrier();
            add_product(layer.down, c.gated, count, c.x, groups(layer.down));
            barrier();
        }
        norm(c.x, normed.data(), count, m.dim, m.eps);
        multiply_into(m.head, normed.data(), count, logits, groups(m.head));
    });
    return true;
}

}  // extern "C"
