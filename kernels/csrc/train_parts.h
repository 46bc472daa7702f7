// Weights, norms and rotary positions of dalle/train_native.cpp and dalle/train_heads.cpp.

#pragma once

#include <cmath>
#include <vector>

#include "products.h"

extern "C" {

struct Shape {
    int64_t batch, length, dim, heads, kv_heads, head_dim, ffn;
    float eps, head_eps;
    int64_t qkv() const { return (heads + 2 * kv_heads) * head_dim; }
    int64_t inner() const { return heads * head_dim; }
};

struct Weights {  // (N, K) and (K), float32, as PyTorch has them; of gradients the same
    float *qkv, *out, *gate_up, *down, *attention_norm, *ffn_norm, *q_norm, *k_norm;
    float** all() { return &qkv; }
    float* const* all() const { return &qkv; }
};

}  // extern "C"

namespace {

using Floats = std::vector<float>;
using Halves = std::vector<Bf16>;

template <typename T>
T* room(std::vector<T>& buffer, int64_t size) {
    if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
    return buffer.data();
}

struct Coming {  // memory that is needed soon: a product has time to bring it into the cache
    const char *next, *end;
    int64_t lines;  // at a time

    // `size` numbers, by as many times
    template <typename T>
    Coming(const T* from, int64_t size, int64_t times)
        : next(reinterpret_cast<const char*>(from)),
          end(next + (from ? size * static_cast<int64_t>(sizeof(T)) : 0)),
          lines((size * static_cast<int64_t>(sizeof(T)) / 64 + times - 1) / times) {}

    void bring() {
        for (int64_t i = 0; i < lines && next < end; i++, next += 64) _mm_prefetch(next, _MM_HINT_T1);
    }
};

template <typename Store>
auto meanwhile(Coming& coming, const Store& store) {
    return [&coming, store](int64_t row, int64_t n, Lanes first, Lanes last) {
        store(row, n, first, last);
        coming.bring();
    };
}

// --- weights ------------------------------------------------------------------------------------------------------

// Row `row` of the product's order: gates and factors of the feed-forward network take turns of 16.
int64_t turn_of(int64_t row, int64_t ffn) { return row / GROUP * 16 + row % 16 + (row % GROUP < 16 ? 0 : ffn); }

// What is done to a matrix when it is packed
struct Packing {
    int64_t ffn = 0;              // or its rows are gates and factors, which take turns
    const float* gain = nullptr;  // of each column, of the norm that comes before
};

// `count` rows of a matrix from 32 g on in bfloat16, up to 32 of them, the rest zeros
void round_group(const float* weight, int64_t count, int64_t columns, int64_t g, const Packing& how, Bf16* to) {
    for (int64_t i = 0; i < std::min(count, GROUP); i++) {
        const int64_t row = g * GROUP + i;
        const float* from = weight + (how.ffn ? turn_of(row, how.ffn) : row) * columns;
        for (int64_t c = 0; c < columns; c += 16) {
            const Lanes part = load(from + c);
            store_bf16(to + i * columns + c, how.gain ? mul(part, load(how.gain + c)) : part);
        }
    }
    if (count < GROUP) std::fill(to + count * columns, to + GROUP * columns, 0);
}

struct Matrix {  // (N, K) packed to be multiplied with, as it is or transposed; N is rounded up to whole groups
    Halves packed;
    int64_t n, k;
    bool transposed;

    void fit(int64_t rows, int64_t columns, bool turned) {
        n = rows, k = columns, transposed = turned;
        room(packed, whole_groups(n) * k);
    }

    // A part of it: groups of 32 rows of `weight`
    void pack(const float* weight, const Packing& how, int64_t thread, int64_t threads) {
        static thread_local Halves rounded;
        Bf16* few = room(rounded, GROUP * k);
        const Range groups = share(whole_groups(n) / GROUP, thread, threads);
        for (int64_t g = groups.begin; g < groups.end; g++) {
            round_group(weight, n - g * GROUP, k, g, how, few);
            if (!transposed) pack_rows(in_rows(few, k), GROUP, k, packed.data() + g * GROUP * k);
            for (int64_t c = 0; transposed && c < k; c += GROUP)
                pair_rows(in_rows(few + c, k), GROUP, GROUP / 2, GROUP,
                          packed.data() + c * whole_groups(n) + g * GROUP * GROUP, 0);
        }
    }

    // a (count, inputs), rows `step` apart: some of the inputs, from `first` on
    template <typename Store>
    void multiply_some(const Bf16* a, int64_t count, int64_t step, int64_t first, int64_t inputs,
                       const Store& store) const {
        const int64_t size = GROUP * (transposed ? whole_groups(n) : k);
        product(a, count, step, inputs, packed.data() + first * GROUP, size, whole_groups(transposed ? k : n) / GROUP,
                store);
    }

    template <typename Store>
    void multiply(const Bf16* a, int64_t count, const Store& store) const {
        const int64_t inputs = transposed ? n : k;
        multiply_some(a, count, inputs, 0, inputs, store);
    }
};

struct Packed {
    Matrix qkv, out, gate_up, down;

    void fit(const Shape& s, bool transposed) {
        qkv.fit(s.qkv(), s.dim, transposed);
        out.fit(s.dim, s.inner(), transposed);
        gate_up.fit(2 * s.ffn, s.dim, transposed);
        down.fit(s.dim, s.ffn, transposed);
    }

    void pack(const Shape& s, const Weights& w, int64_t thread, int64_t threads) {
        qkv.pack(w.qkv, {0, w.attention_norm}, thread, threads);
        out.pack(w.out, {}, thread, threads);
        gate_up.pack(w.gate_up, {s.ffn, w.ffn_norm}, thread, threads);
        down.pack(w.down, {}, thread, threads);
    }
};

// --- norms and rotary positions -----------------------------------------------------------------------------------

// 1 / rms of `width` numbers, of their squares' sums
float inverse_rms(Lanes squares, int64_t width, float eps) {
    const float mean = sum_of(squares) / width + eps;
    const float guess = inverse_root_few(mean);  // 14 bits, and a step of Newton's: 27
    return guess * (1.5f - 0.5f * mean * guess * guess);
}

// x / rms(x) in bfloat16, rows of `width`, and 1 / rms(x). The gains that follow are in the weights.
void norm_rows(const float* x, int64_t rows, int64_t width, float eps, Bf16* y, float* scales) {
    for (int64_t r = 0; r < rows; r++, x += width, y += width) {
        Lanes squares = zeros();
        for (int64_t i = 0; i < width; i += 16)
            squares = fmadd(load(x + i), load(x + i), squares);
        scales[r] = inverse_rms(squares, width, eps);
        for (int64_t i = 0; i < width; i += GROUP) {
            const Lanes scale = fill(scales[r]), last = load(x + i + 16);
            store_line(y + i, mul(load(x + i), scale), mul(last, scale));
        }
    }
}

// What comes back through a norm of one row, y = x scale: dx = given + scale (dy - y mean(dy y))
void unnorm_row(const Bf16* y, float scale, const float* dy, int64_t width, const float* given, float* dx) {
    Lanes sum = zeros();
    for (int64_t i = 0; i < width; i += 16) sum = fmadd(load(dy + i), widen(y + i), sum);
    const Lanes mean = fill(sum_of(sum) / width);
    for (int64_t i = 0; i < width; i += 16) {
        const Lanes back = fnmadd(widen(y + i), mean, load(dy + i));
        put16(dx + i, fmadd(back, fill(scale), load(given + i)));
    }
}

// The gradient of 16 weights behind a gain, from that of their products with it; adds to that of the gain
Lanes by_gained(Lanes by, const float* weight, const float* gain, float* by_gain) {
    put16(by_gain, fmadd(by, load(weight), load(by_gain)));
    return mul(by, load(gain));
}

struct Rotary {                          // norms and rotary positions of a kind of heads
    const float *gain, *cosine, *sine;  // (K), (L, K), (L, K)
    float eps, factor;                  // of what is normed and turned
};

// f(registers of a head), a constant; heads have 128 numbers at most
template <typename F>
void with_registers(int64_t width, const F& f) {
    if (width == 32) return f(std::integral_constant<int, 2>());
    if (width == 64) return f(std::integral_constant<int, 4>());
    if (width == 96) return f(std::integral_constant<int, 6>());
    f(std::integral_constant<int, 8>());
}

// Rows of a head normed and turned: raw (L, K) bfloat16 -> y (L, K) bfloat16
void rotate_rows(Rows raw, int64_t rows, int64_t width, const Rotary& rotary, Bf16* y) {
    with_registers(width, [&](auto registers) {
        constexpr int N = registers, HALF = N / 2;
        for (int64_t t = 0; t < rows; t++) {
            Lanes x[N], squares = zeros();
#pragma GCC unroll 8
            for (int i = 0; i < N; i++) x[i] = widen(raw.at(t, 16 * i)), squares = fmadd(x[i], x[i], squares);
            const Lanes scale = fill(inverse_rms(squares, 16 * N, rotary.eps) * rotary.factor);
#pragma GCC unroll 8
            for (int i = 0; i < N; i++)
                x[i] = mul(mul(x[i], scale), load(rotary.gain + 16 * i));
#pragma GCC unroll 8
            for (int i = 0; i < N; i++) {
                const int64_t at = (t * N + i) * 16;
                const Lanes straight = mul(x[i], load(rotary.cosine + at));
                const Lanes sine = load(rotary.sine + at);
                store_bf16(y + at, fmadd(x[(i + HALF) % N], sine, straight));
            }
        }
    });
}

// Back through `rotate_rows`: dy (L, K) in float32, a row of it from `given(t)` on and its next 32 numbers `far` further;
// raw's gradient goes to `draw`, rows `step` apart
template <typename Given>
void unrotate_rows(Rows raw, Range rows, int64_t width, const Rotary& rotary, const Given& given, int64_t far,
                 float* by_gain, Bf16* draw, int64_t step) {
    with_registers(width, [&](auto registers) {
        constexpr int N = registers, HALF = N / 2;
        Lanes gain[N], by[N];
#pragma GCC unroll 8
        for (int i = 0; i < N; i++) gain[i] = load(rotary.gain + 16 * i), by[i] = zeros();
        for (int64_t t = rows.begin; t < rows.end; t++) {
            const float* dy = given(t);
            Lanes x[N], back[N], squares = zeros(), sum = zeros();
#pragma GCC unroll 8
            for (int i = 0; i < N; i++) x[i] = widen(raw.at(t, 16 * i)), squares = fmadd(x[i], x[i], squares);
            const float scale = inverse_rms(squares, 16 * N, rotary.eps);
#pragma GCC unroll 8
            for (int i = 0; i < N; i++) {
                const int other = (i + HALF) % N;
                const auto from = [&](int j) { return load(dy + j / 2 * far + j % 2 * 16); };
                const auto at = [&](const float* table, int j) { return load(table + (t * N + j) * 16); };
                back[i] = mul(from(i), at(rotary.cosine, i));
                back[i] = fmadd(from(other), at(rotary.sine, other), back[i]);
                back[i] = mul(back[i], fill(scale * rotary.factor));
                by[i] = fmadd(back[i], x[i], by[i]);
                back[i] = mul(back[i], gain[i]);
                sum = fmadd(back[i], x[i], sum);
            }
            const Lanes slope = fill(-sum_of(sum) / (16 * N) * scale * scale);
#pragma GCC unroll 8
            for (int i = 0; i < N; i++) store_bf16(draw + t * step + 16 * i, fmadd(x[i], slope, back[i]));
        }
#pragma GCC unroll 8
        for (int i = 0; i < N; i++)
            put16(by_gain + 16 * i, add(load(by_gain + 16 * i), by[i]));
    });
}

}  // namespace
