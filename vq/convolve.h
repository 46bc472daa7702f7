// Convolutions and group norms of vq/native.cpp over one picture.
//
// Convolutions are sums over their taps of products of a line of places with the tap's weights: nothing is unfolded.
// What is convolved: (H + 2, W + 2, C) bfloat16 with a border of zeros; what comes out: whatever `store` makes of it.

#pragma once

#include "avx512.h"

#include <algorithm>
#include <cmath>

extern "C" {

struct Conv {
    const Bf16* weight;  // packed
    const float* bias;   // (outputs)
    int64_t inputs, outputs, kernel, stride;  // inputs even, outputs a multiple of 32
};

struct Norm {
    const float *weight, *bias;  // (C)
    int64_t channels, groups;
    float eps;
};

}  // extern "C"

namespace {

struct Grid {
    int64_t height, width, channels;
    int64_t places() const { return height * width; }
    int64_t line() const { return (width + 2) * channels; }
    int64_t at(int64_t y, int64_t x) const { return (y + 1) * line() + (x + 1) * channels; }  // within the border
};

// --- convolutions -------------------------------------------------------------------------------------------------

// R places from `in` on, `step` apart, by lines `taps` of the kernel: store(place, first 16 sums, last 16 sums).
template <int R, typename Store>
void convolve_tile(const Conv& c, const Bf16* in, int64_t step, int64_t line, Range taps, const Bf16* group,
                   const Store& store) {
    __m512 sums[R][2];
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    group += taps.begin * c.kernel * c.inputs * GROUP;
    for (int64_t y = taps.begin; y < taps.end; y++)
        for (int64_t x = 0; x < c.kernel; x++, group += c.inputs * GROUP) {
            const Ahead ahead{reinterpret_cast<const char*>(group + c.inputs * GROUP), 4 * GROUP};
            accumulate<R>(sums, in + y * line + x * c.inputs, step, c.inputs, group, ahead);
        }
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) store(r, sums[r][0], sums[r][1]);
}

template <int R, typename Store>
void convolve_places(int64_t n, const Conv& c, const Bf16* in, int64_t step, int64_t line, Range taps,
                     const Bf16* group, const Store& store) {
    if (n == R) return convolve_tile<R>(c, in, step, line, taps, group, store);
    if constexpr (R > 1) convolve_places<R - 1>(n, c, in, step, line, taps, group, store);
}

// Lines of places against all outputs: store(line, place, first output, its 16 sums, the next 16 sums).
template <typename Store>
void convolve(const Conv& c, const Bf16* in, int64_t line, int64_t height, int64_t width, const Store& store) {
    const int64_t tiles = (width + MAX_TILE - 1) / MAX_TILE;
    for (int64_t g = 0; g < c.outputs / GROUP; g++) {
        const Bf16* group = c.weight + g * c.kernel * c.kernel * c.inputs * GROUP;
        __m512 low = _mm512_setzero_ps(), high = low;
        if (c.bias) low = _mm512_loadu_ps(c.bias + g * GROUP), high = _mm512_loadu_ps(c.bias + g * GROUP + 16);
        for (int64_t y = 0; y < height; y++) {
            const bool first_line = c.kernel > 1 && y == 0, last_line = c.kernel > 1 && y == height - 1;
            const Range taps{first_line, c.kernel - last_line};  // the rest lies on the border
            for (int64_t t = 0; t < tiles; t++) {
                const Range places = share(width, t, tiles);
                const Bf16* from = in + y * c.stride * line + places.begin * c.stride * c.inputs;
                const auto biased = [&](int64_t place, __m512 first, __m512 last) {
                    store(y, places.begin + place, g * GROUP, _mm512_add_ps(first, low), _mm512_add_ps(last, high));
                };
                const int64_t number = places.end - places.begin, step = c.stride * c.inputs;
                convolve_places<MAX_TILE>(number, c, from, step, line, taps, group, biased);
            }
        }
    }
}

struct Putter {  // of sums into x (lines, width, channels)
    float* x;
    int64_t width, channels;
    void operator()(int64_t y, int64_t place, int64_t n, __m512 first, __m512 last) const {
        float* to = x + (y * width + place) * channels + n;
        _mm512_storeu_ps(to, first);
        _mm512_storeu_ps(to + 16, last);
    }
};

struct Adder {  // the same, added
    float* x;
    int64_t width, channels;
    void operator()(int64_t y, int64_t place, int64_t n, __m512 first, __m512 last) const {
        float* to = x + (y * width + place) * channels + n;
        _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), first));
        _mm512_storeu_ps(to + 16, _mm512_add_ps(_mm512_loadu_ps(to + 16), last));
    }
};

// --- between convolutions -----------------------------------------------------------------------------------------

void clear_border(Bf16* x, Grid grid) {
    std::fill_n(x, grid.line(), 0);
    std::fill_n(x + (grid.height + 1) * grid.line(), grid.line(), 0);
    for (int64_t y = 1; y <= grid.height; y++) {
        std::fill_n(x + y * grid.line(), grid.channels, 0);
        std::fill_n(x + (y + 1) * grid.line() - grid.channels, grid.channels, 0);
    }
}

// Of every channel the factor and the shift that norm its group: x (places, C) -> two rows (C)
void measure(const Norm& norm, const float* x, int64_t places, float* factor, float* shift) {
    const int64_t channels = norm.channels, each = channels / norm.groups;
    for (int64_t c = 0; c < channels; c += 16) {
        __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int64_t p = 0; p < places; p++) sums[p & 3] = _mm512_add_ps(sums[p & 3], _mm512_loadu_ps(x + p * channels + c));
        _mm512_storeu_ps(factor + c, _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
    }
    for (int64_t g = 0; g < channels; g += each) {
        double sum = 0;
        for (int64_t c = g; c < g + each; c++) sum += factor[c];
        std::fill_n(shift + g, each, static_cast<float>(sum / (each * places)));
    }
    for (int64_t c = 0; c < channels; c += 16) {
        const __m512 mean = _mm512_loadu_ps(shift + c);
        __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int64_t p = 0; p < places; p++) {
            const __m512 apart = _mm512_sub_ps(_mm512_loadu_ps(x + p * channels + c), mean);
            sums[p & 3] = _mm512_fmadd_ps(apart, apart, sums[p & 3]);
        }
        _mm512_storeu_ps(factor + c, _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
    }
    for (int64_t g = 0; g < channels; g += each) {
        double squares = 0;
        for (int64_t c = g; c < g + each; c++) squares += factor[c];
        const double inverse = 1 / std::sqrt(squares / (each * places) + norm.eps);
        for (int64_t c = g; c < g + each; c++) {
            factor[c] = static_cast<float>(inverse) * norm.weight[c];
            shift[c] = norm.bias[c] - shift[c] * factor[c];
        }
    }
}

// norm(x), or its silu, in bfloat16: x (H, W, C), to: lines `line` apart
template <bool SILU>
void apply_norm(const Norm& norm, const float* x, Grid grid, float* room, Bf16* to, int64_t line) {
    float *factor = room, *shift = room + grid.channels;
    measure(norm, x, grid.places(), factor, shift);
    for (int64_t y = 0; y < grid.height; y++, to += line)
        for (int64_t i = 0; i < grid.width * grid.channels; i += grid.channels, x += grid.channels)
            for (int64_t c = 0; c < grid.channels; c += 16) {
                const __m512 part = _mm512_loadu_ps(x + c);
                const __m512 normed = _mm512_fmadd_ps(part, _mm512_loadu_ps(factor + c), _mm512_loadu_ps(shift + c));
                store_bf16(to + i + c, SILU ? silu512(normed) : normed);
            }
}

}  // namespace
