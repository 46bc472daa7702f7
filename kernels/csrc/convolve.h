// Convolutions and group norms of vq/native.cpp over one picture.
//
// Kernels of 3 x 3 over even sides go by tiles of 2 x 2 places in 16 products instead of 36 (Winograd's F(2 x 2, 3 x
// 3); Lavin and Gray 2015, arXiv:1509.09308). Others are sums over their taps of products of a line of places with the
// tap's weights. What is convolved: (H + 2, W + 2, C) bfloat16 with a border of zeros; what comes out is up to `store`.

#pragma once

#include "products.h"

#include <algorithm>
#include <cmath>
#include <vector>

extern "C" {

struct Conv {
    const Bf16* weight;                       // (N / 32, kernel^2, C / 2, 2, 16, 2)
    const Bf16* transformed;                  // (N / 32, 16, C / 2, 2, 16, 2): of a 3 x 3 kernel, for its tiles
    const float* bias;                        // (N) or null
    int64_t inputs, outputs, kernel, stride;  // C: whole registers where there are tiles, else even; N, of 32
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
[[gnu::flatten]] void convolve_tile(const Conv& c, const Bf16* in, int64_t step, int64_t line, Range taps,
                                    const Bf16* group, const Store& store) {
    Lanes sums[R][2];
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) sums[r][0] = sums[r][1] = zeros();
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
        Lanes low = zeros(), high = low;
        if (c.bias) low = load(c.bias + g * GROUP), high = load(c.bias + g * GROUP + 16);
        for (int64_t y = 0; y < height; y++) {
            const bool first_line = c.kernel > 1 && y == 0, last_line = c.kernel > 1 && y == height - 1;
            const Range taps{first_line, c.kernel - last_line};  // the rest lies on the border
            for (int64_t t = 0; t < tiles; t++) {
                const Range places = share(width, t, tiles);
                const Bf16* from = in + y * c.stride * line + places.begin * c.stride * c.inputs;
                const auto biased = [&](int64_t place, Lanes first, Lanes last) {
                    store(y, places.begin + place, g * GROUP, add(first, low), add(last, high));
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
    void operator()(int64_t y, int64_t place, int64_t n, Lanes first, Lanes last) const {
        float* to = x + (y * width + place) * channels + n;
        put16(to, first);
        put16(to + 16, last);
    }
};

struct Adder {  // the same, added
    float* x;
    int64_t width, channels;
    void operator()(int64_t y, int64_t place, int64_t n, Lanes first, Lanes last) const {
        float* to = x + (y * width + place) * channels + n;
        put16(to, add(load(to), first));
        put16(to + 16, add(load(to + 16), last));
    }
};

// --- 3 x 3 by tiles -------------------------------------------------------------------------------------------------

constexpr int64_t TILES = 64;  // of a block: what is made of them stays in the cache
constexpr int64_t POINTS = 16;

struct Tiles {               // room for a block
    std::vector<Bf16> in;    // (16, TILES, C), a line more a point: else all points would meet in one set of the cache
    std::vector<float> out;  // (16, TILES, 32), the same
    static int64_t in_step(int64_t channels) { return TILES * channels + 32; }
    static constexpr int64_t OUT_STEP = TILES * GROUP + 16;
    void fit(int64_t channels) {
        in.resize(std::max<int64_t>(in.size(), POINTS * in_step(channels)));
        out.resize(POINTS * OUT_STEP);
    }
};

// 4 x 4 places at `corner` -> 16 points, `step` apart: B^T d B
void transform_in(const Bf16* corner, int64_t line, int64_t channels, Bf16* to, int64_t step) {
    for (int64_t c = 0; c < channels; c += 16) {
        Lanes d[4][4];
#pragma GCC unroll 4
        for (int x = 0; x < 4; x++) {
            Lanes column[4];
#pragma GCC unroll 4
            for (int y = 0; y < 4; y++) column[y] = widen(corner + y * line + x * channels + c);
            d[0][x] = sub(column[0], column[2]);
            d[1][x] = add(column[1], column[2]);
            d[2][x] = sub(column[2], column[1]);
            d[3][x] = sub(column[1], column[3]);
        }
#pragma GCC unroll 4
        for (int y = 0; y < 4; y++) {
            Bf16* at = to + y * 4 * step + c;
            store_bf16(at, sub(d[y][0], d[y][2]));
            store_bf16(at + step, add(d[y][1], d[y][2]));
            store_bf16(at + 2 * step, sub(d[y][2], d[y][1]));
            store_bf16(at + 3 * step, sub(d[y][1], d[y][3]));
        }
    }
}

// 16 points of 16 outputs, `OUT_STEP` apart -> 2 x 2 places: A^T m A
void transform_out(const float* from, Lanes bias, Lanes (&places)[4]) {
    Lanes rows[2][4];
#pragma GCC unroll 4
    for (int x = 0; x < 4; x++) {
        Lanes m[4];
#pragma GCC unroll 4
        for (int y = 0; y < 4; y++) m[y] = load(from + (y * 4 + x) * Tiles::OUT_STEP);
        rows[0][x] = add(add(m[0], m[1]), m[2]);
        rows[1][x] = sub(sub(m[1], m[2]), m[3]);
    }
#pragma GCC unroll 2
    for (int y = 0; y < 2; y++) {
        const Lanes biased = add(bias, rows[y][1]);
        places[2 * y] = add(add(biased, rows[y][0]), rows[y][2]);
        places[2 * y + 1] = sub(sub(biased, rows[y][2]), rows[y][3]);
    }
}

// As `convolve`, for 3 x 3 kernels over even sides.
template <typename Store>
void convolve_by_tiles(const Conv& c, const Bf16* in, Grid grid, Tiles& room, const Store& store) {
    const int64_t across = grid.width / 2, size = c.inputs * GROUP, step = Tiles::in_step(c.inputs);
    const int64_t all = grid.height / 2 * across;
    for (int64_t begin = 0; begin < all; begin += TILES) {
        const int64_t number = std::min(TILES, all - begin);
        for (int64_t i = 0; i < number; i++) {
            const int64_t y = (begin + i) / across * 2, x = (begin + i) % across * 2;
            const Bf16* corner = in + y * (grid.width + 2) * c.inputs + x * c.inputs;
            transform_in(corner, (grid.width + 2) * c.inputs, c.inputs, room.in.data() + i * c.inputs, step);
        }
        for (int64_t g = 0; g < c.outputs / GROUP; g++) {
            const Bf16* group = c.transformed + g * POINTS * size;
            for (int64_t point = 0; point < POINTS; point++, group += size) {
                const Putter put{room.out.data() + point * Tiles::OUT_STEP, 0, GROUP};
                product(room.in.data() + point * step, number, c.inputs, c.inputs, group, size, 1,
                        [&](int64_t i, int64_t n, Lanes first, Lanes last) { put(0, i, n, first, last); });
            }
            const Lanes low = load(c.bias + g * GROUP), high = load(c.bias + g * GROUP + 16);
            for (int64_t i = 0; i < number; i++) {
                Lanes first[4], last[4];
                transform_out(room.out.data() + i * GROUP, low, first);
                transform_out(room.out.data() + i * GROUP + 16, high, last);
                const int64_t y = (begin + i) / across * 2, x = (begin + i) % across * 2;
                for (int at = 0; at < 4; at++) store(y + at / 2, x + at % 2, g * GROUP, first[at], last[at]);
            }
        }
    }
}

// 3 x 3 over a grid with its border
template <typename Store>
void convolve_grid(const Conv& c, const Bf16* in, Grid grid, Tiles& room, const Store& store) {
    if (c.transformed && grid.height % 2 == 0 && grid.width % 2 == 0)
        return convolve_by_tiles(c, in, grid, room, store);
    convolve(c, in, (grid.width + 2) * c.inputs, grid.height, grid.width, store);
}

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
        Lanes sums[4] = {zeros(), zeros(), zeros(), zeros()};
        for (int64_t p = 0; p < places; p++)
            sums[p & 3] = add(sums[p & 3], load(x + p * channels + c));
        put16(factor + c, add(add(sums[0], sums[1]), add(sums[2], sums[3])));
    }
    for (int64_t g = 0; g < channels; g += each) {
        double sum = 0;
        for (int64_t c = g; c < g + each; c++) sum += factor[c];
        std::fill_n(shift + g, each, static_cast<float>(sum / (each * places)));
    }
    for (int64_t c = 0; c < channels; c += 16) {
        const Lanes mean = load(shift + c);
        Lanes sums[4] = {zeros(), zeros(), zeros(), zeros()};
        for (int64_t p = 0; p < places; p++) {
            const Lanes apart = sub(load(x + p * channels + c), mean);
            sums[p & 3] = fmadd(apart, apart, sums[p & 3]);
        }
        put16(factor + c, add(add(sums[0], sums[1]), add(sums[2], sums[3])));
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
                const Lanes part = load(x + c);
                const Lanes normed = fmadd(part, load(factor + c), load(shift + c));
                store_bf16(to + i + c, SILU ? silu16(normed) : normed);
            }
}

}  // namespace
