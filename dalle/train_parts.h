// Weights, norms and rotary positions of dalle/train_native.cpp.

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

// --- weights ------------------------------------------------------------------------------------------------------

// Row `row` of the product's order: gates and factors of the feed-forward network take turns of 16.
int64_t turn_of(int64_t row, int64_t ffn) { return row / GROUP * 16 + row % 16 + (row % GROUP < 16 ? 0 : ffn); }

// Rows 32 g .. 32 g + 31 of a matrix in bfloat16; ffn: 0, or its gates and factors in turns
void round_group(const float* weight, int64_t columns, int64_t g, int64_t ffn, Bf16* to) {
    for (int64_t i = 0; i < GROUP; i++) {
        const int64_t row = g * GROUP + i;
        const float* from = weight + (ffn ? turn_of(row, ffn) : row) * columns;
        for (int64_t c = 0; c < columns; c += 16) store_bf16(to + i * columns + c, _mm512_loadu_ps(from + c));
    }
}

struct Matrix {  // packed to be multiplied with, as it is or transposed
    Halves packed;
    int64_t rows, columns;

    void pack(const float* weight, int64_t n, int64_t k, int64_t ffn, bool transposed, Range groups) {
        static thread_local Halves rounded;
        Bf16* few = room(rounded, GROUP * k);
        for (int64_t g = groups.begin; g < groups.end; g++) {
            round_group(weight, k, g, ffn, few);
            if (!transposed) pack_rows(in_rows(few, k), GROUP, k, packed.data() + g * GROUP * k);
            for (int64_t c = 0; transposed && c < k; c += GROUP)
                pair_rows(in_rows(few + c, k), GROUP, GROUP / 2, GROUP, packed.data() + c * n + g * GROUP * GROUP, 0);
        }
    }

    void fit(int64_t n, int64_t k, bool transposed) {
        room(packed, n * k);
        rows = transposed ? k : n, columns = transposed ? n : k;
    }

    template <typename Store>
    void multiply(const Bf16* a, int64_t count, const Store& store) const {
        product(a, count, columns, columns, packed.data(), columns * GROUP, rows / GROUP, store);
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

    void pack(const Shape& s, const Weights& w, bool transposed, int64_t thread, int64_t threads) {
        const auto part = [&](int64_t n) { return share(n / GROUP, thread, threads); };
        qkv.pack(w.qkv, s.qkv(), s.dim, 0, transposed, part(s.qkv()));
        out.pack(w.out, s.dim, s.inner(), 0, transposed, part(s.dim));
        gate_up.pack(w.gate_up, 2 * s.ffn, s.dim, s.ffn, transposed, part(2 * s.ffn));
        down.pack(w.down, s.dim, s.ffn, 0, transposed, part(s.dim));
    }
};

// --- norms and rotary positions -----------------------------------------------------------------------------------

float scale_of(const float* x, int64_t width, float eps) {
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += 16)
        squares = _mm512_fmadd_ps(_mm512_loadu_ps(x + i), _mm512_loadu_ps(x + i), squares);
    const float mean = _mm512_reduce_add_ps(squares) / width + eps;
    const __m128 wide = _mm_set_ss(mean);
    const float guess = _mm_cvtss_f32(_mm_rsqrt14_ss(wide, wide));  // 14 bits, and a step of Newton's: 27
    return guess * (1.5f - 0.5f * mean * guess * guess);
}

// x / rms(x) * gain in bfloat16, rows of `width`
void norm_rows(const float* x, const float* gain, int64_t rows, int64_t width, float eps, Bf16* y) {
    for (int64_t r = 0; r < rows; r++, x += width, y += width) {
        const __m512 scale = _mm512_set1_ps(scale_of(x, width, eps));
        for (int64_t i = 0; i < width; i += 16)
            store_bf16(y + i, _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x + i), scale), _mm512_loadu_ps(gain + i)));
    }
}

// What comes back through a norm of one row: dx = or += scale (dy gain - x scale^2 mean(dy gain x)); by_gain += dy x
// scale
template <bool ADD>
void unnorm_row(const float* x, const float* gain, const float* dy, int64_t width, float eps, float* dx,
                float* by_gain) {
    const float scale = scale_of(x, width, eps);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += 16) {
        const __m512 product = _mm512_mul_ps(_mm512_loadu_ps(dy + i), _mm512_loadu_ps(x + i));
        sum = _mm512_fmadd_ps(product, _mm512_loadu_ps(gain + i), sum);
        _mm512_storeu_ps(by_gain + i, _mm512_fmadd_ps(product, _mm512_set1_ps(scale), _mm512_loadu_ps(by_gain + i)));
    }
    const __m512 slope = _mm512_set1_ps(-_mm512_reduce_add_ps(sum) / width * scale * scale * scale);
    for (int64_t i = 0; i < width; i += 16) {
        const __m512 direct = _mm512_mul_ps(_mm512_loadu_ps(dy + i), _mm512_loadu_ps(gain + i));
        __m512 back = _mm512_mul_ps(_mm512_loadu_ps(x + i), slope);
        back = _mm512_fmadd_ps(direct, _mm512_set1_ps(scale), back);
        if (ADD) back = _mm512_add_ps(back, _mm512_loadu_ps(dx + i));
        _mm512_storeu_ps(dx + i, back);
    }
}

// A head normed and turned: row `t` of raw (L, K) bfloat16 -> y (K) bfloat16, times `factor`
void turn_head(Rows raw, int64_t t, const float* gain, const float* cosine, const float* sine, int64_t width, float eps,
               float factor, float* few, Bf16* y) {
    for (int64_t i = 0; i < width; i += 16) _mm512_storeu_ps(few + i, widen(raw.at(t, i)));
    const __m512 scale = _mm512_set1_ps(scale_of(few, width, eps) * factor);
    for (int64_t i = 0; i < width; i += 16) {
        const __m512 normed = _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(few + i), scale), _mm512_loadu_ps(gain + i));
        _mm512_storeu_ps(few + i, normed);
    }
    const int64_t half = width / 2;
    for (int64_t i = 0; i < width; i += 16) {
        const int64_t other = i < half ? i + half : i - half;
        const __m512 straight = _mm512_mul_ps(_mm512_loadu_ps(few + i), _mm512_loadu_ps(cosine + i));
        store_bf16(y + i, _mm512_fmadd_ps(_mm512_loadu_ps(few + other), _mm512_loadu_ps(sine + i), straight));
    }
}

// Back through `turn_head`: dy (K) float32, 32 numbers `far` from the next 32 -> raw's gradient in bfloat16
void unturn_head(Rows raw, int64_t t, const float* gain, const float* cosine, const float* sine, int64_t width,
                 float eps, float factor, float* few, const float* dy, int64_t far, float* by_gain, Bf16* draw) {
    const int64_t half = width / 2;
    const auto given = [&](int64_t i) { return _mm512_loadu_ps(dy + i / GROUP * far + i % GROUP); };
    float *turned = few + width, *back = few + 2 * width;
    for (int64_t i = 0; i < width; i += 16) {
        const int64_t other = i < half ? i + half : i - half;
        __m512 sum = _mm512_mul_ps(given(i), _mm512_loadu_ps(cosine + i));
        sum = _mm512_fmadd_ps(given(other), _mm512_loadu_ps(sine + other), sum);
        _mm512_storeu_ps(turned + i, _mm512_mul_ps(sum, _mm512_set1_ps(factor)));
        _mm512_storeu_ps(few + i, widen(raw.at(t, i)));
    }
    unnorm_row<false>(few, gain, turned, width, eps, back, by_gain);
    for (int64_t i = 0; i < width; i += 16) store_bf16(draw + i, _mm512_loadu_ps(back + i));
}

}  // namespace
