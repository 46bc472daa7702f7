// The encoder of vq/autoencoder.py, and the search for the nearest code, in one call.
//
// A thread takes whole pictures, so the codes of a picture depend neither on its company nor on the number of threads.
// The sum that the blocks add to: (H W, C) float32. Weights of a convolution: (N / 32, taps, C / 2, 2, 16, 2) bfloat16,
// see kernels.h.

#include "abi.h"
#include "convolve.h"
#include "team.h"

#include <limits>
#include <vector>

extern "C" {

enum Kind : int64_t { RESIDUAL = 0, DOWN = 1, ATTENTION = 2 };

struct Block {
    int64_t kind;
    Norm norm;           // of a residual or attention block
    Conv first, second;  // 3 x 3 twice; 4 x 4 with stride 2; qkv and out
};

struct Encoder {
    const float* bands;  // (n, n'): pixels of a patch (row, column, channel) -> bands; n' = n rounded up to 16
    const Block* blocks;
    const float* codes;      // (levels, D + 1, V'): -2 times the codes, transposed, and their squared lengths; or null
    Conv conv_in, conv_out;  // n inputs, n + 1 for an odd n; D outputs, rounded up
    Norm norm_out;
    int64_t patch, num_blocks, head_dim, latent_dim;
    int64_t num_codes;      // V' = V rounded up to 16, the rest infinitely far
    int64_t unit;           // whether latents are scaled to length 1 before the search
    int64_t levels;         // codes of a position; each further one is nearest to what those before leave over
    int64_t codebook_size;  // V, the base in which they make one number
};

struct Pictures {
    const float* pixels;
    int64_t strides[4];  // of picture, channel, row and column
    int64_t number, height, width;
};

}  // extern "C"

EXPORT_ABI(sizeof(Conv), sizeof(Norm), sizeof(Block), sizeof(Encoder), sizeof(Pictures))

namespace {

// --- pictures ---------------------------------------------------------------------------------------------------

// A picture's patches as bands: (H, W, n), the border cleared; room for PATCHES patches
constexpr int PATCHES = 8;

void to_bands(const Encoder& e, const Pictures& p, int64_t picture, Grid grid, float* room, Bf16* to) {
    const int64_t side = e.patch, size = 3 * side * side, whole = (size + 15) / 16 * 16;
    clear_border(to, grid);
    for (int64_t y = 0; y < grid.height; y++)
        for (int64_t x = 0; x < grid.width; x += PATCHES) {
            const int64_t n = std::min<int64_t>(PATCHES, grid.width - x);
            const float* corner = p.pixels + picture * p.strides[0] + y * side * p.strides[2] + x * side * p.strides[3];
            float* pixel = room;
            for (int64_t i = 0; i < n; i++, corner += side * p.strides[3])
                for (int64_t v = 0; v < side; v++)
                    for (int64_t u = 0; u < side; u++)
                        for (int64_t channel = 0; channel < 3; channel++)
                            *pixel++ = corner[v * p.strides[2] + u * p.strides[3] + channel * p.strides[1]];
            for (int64_t c = 0; c < grid.channels; c += 16) {
                Lanes sums[PATCHES];
                for (int i = 0; i < PATCHES; i++) sums[i] = zeros();
                for (int64_t k = 0; k < size; k++) {
                    const Lanes bands = load(e.bands + k * whole + c);
#pragma GCC unroll 8
                    for (int i = 0; i < PATCHES; i++)
                        sums[i] = fmadd(fill(room[i * size + k]), bands, sums[i]);
                }
                const Mask there = first_lanes(grid.channels - c);
                for (int i = 0; i < n; i++)
                    store_some_bf16(to + grid.at(y, x + i) + c, there, sums[i]);
            }
        }
}

// --- blocks -------------------------------------------------------------------------------------------------------

struct Room {  // of a thread, for a picture
    std::vector<float> sums, small, scores;
    std::vector<Bf16> in, middle, queries, rest, keys, values, weights;
    Tiles tiles;

    void fit(const Encoder& e, Grid grid) {
        int64_t most = 0, padded = 0, widest = 0;
        const auto see = [&](Grid g) {
            most = std::max(most, (g.height + 2) * (g.width + 2) * g.channels);
            widest = std::max(widest, g.channels);
            tiles.fit(g.channels);
        };
        see({grid.height, grid.width, e.conv_in.inputs});
        see(grid);
        for (const Block* b = e.blocks; b < e.blocks + e.num_blocks; b++) {
            if (b->kind == DOWN) see(grid = {grid.height / 2, grid.width / 2, b->first.outputs});
            if (b->kind != ATTENTION) continue;
            padded = whole_groups(grid.places());
            queries.resize(grid.places() * grid.channels);
            rest.resize(2 * grid.places() * grid.channels);
        }
        see({grid.height, grid.width, e.conv_out.outputs});
        sums.resize(most);
        in.resize(most);
        middle.resize(most);
        small.resize(std::max(2 * widest, PATCHES * 3 * e.patch * e.patch));
        scores.resize(BAND * padded);
        weights.resize(BAND * padded);
        keys.resize(padded * e.head_dim);
        values.resize(padded * e.head_dim);
    }
};

void residual(const Block& b, Grid grid, Room& room) {
    clear_border(room.in.data(), grid);
    clear_border(room.middle.data(), grid);
    float* x = room.sums.data();
    apply_norm<true>(b.norm, x, grid, room.small.data(), room.in.data() + grid.at(0, 0), grid.line());
    const auto put_silu = [&](int64_t y, int64_t place, int64_t n, Lanes first, Lanes last) {
        Bf16* to = room.middle.data() + grid.at(y, place) + n;
        store_line(to, silu16(first), silu16(last));
    };
    convolve_grid(b.first, room.in.data(), grid, room.tiles, put_silu);
    convolve_grid(b.second, room.middle.data(), grid, room.tiles, Adder{x, grid.width, grid.channels});
}

Grid downsample(const Block& b, Grid grid, Room& room) {
    clear_border(room.in.data(), grid);
    const float* x = room.sums.data();
    for (int64_t y = 0; y < grid.height; y++)
        for (int64_t i = 0; i < grid.width * grid.channels; i += 16, x += 16)
            store_bf16(room.in.data() + grid.at(y, 0) + i, load(x));
    const Grid half{grid.height / 2, grid.width / 2, b.first.outputs};
    const Putter put{room.sums.data(), half.width, half.channels};
    convolve(b.first, room.in.data(), grid.line(), half.height, half.width, put);
    return half;
}

// exp(scores - their maximum) in bfloat16, 0 from `places` to `padded`; returns 1 / their sum
float soften(const float* scores, int64_t places, int64_t padded, Bf16* weights) {
    const Lanes nothing = fill(-std::numeric_limits<float>::infinity());
    const auto seen = [&](int64_t i) {
        const Mask there = first_lanes(std::max<int64_t>(places - i, 0));
        return load_some(there, scores + i, nothing);
    };
    Lanes most = nothing, total = zeros();
    for (int64_t i = 0; i < padded; i += 16) most = larger(most, seen(i));
    most = fill(most_of(most));
    for (int64_t i = 0; i < padded; i += 16) {
        const Lanes p = exp16(sub(seen(i), most));
        store_bf16(weights + i, p);
        total = add(total, p);
    }
    return 1 / sum_of(total);
}

void attend(int64_t head, int64_t width, Grid grid, Room& room, Bf16* to) {
    const int64_t places = grid.places(), padded = whole_groups(places), step = 2 * grid.channels;
    const Bf16* key = room.rest.data() + head * width;
    pack_rows({key, step, GROUP}, places, width, room.keys.data());
    pair_rows({key + grid.channels, step, GROUP}, places, padded / 2, width, room.values.data(), padded / 2);
    const Putter put{room.scores.data(), 0, padded};
    float inverse[BAND];
    for (int64_t begin = 0; begin < places; begin += BAND) {
        const int64_t n = std::min(BAND, places - begin);
        const Bf16* queries = room.queries.data() + (head * places + begin) * width;
        near_product(queries, n, width, width, room.keys.data(), width * GROUP, padded / GROUP,
                     [&](int64_t i, int64_t p, Lanes first, Lanes last) { put(0, i, p, first, last); });
        for (int64_t i = 0; i < n; i++)
            inverse[i] = soften(room.scores.data() + i * padded, places, padded, room.weights.data() + i * padded);
        near_product(room.weights.data(), n, padded, padded, room.values.data(), padded * GROUP, width / GROUP,
                     [&](int64_t i, int64_t k, Lanes first, Lanes last) {
                         const Lanes scale = fill(inverse[i]);
                         store_line(to + (begin + i) * grid.channels + head * width + k, mul(first, scale),
                                    mul(last, scale));
                     });
    }
}

void attention(const Block& b, int64_t width, Grid grid, Room& room) {
    const int64_t places = grid.places(), channels = grid.channels;
    float* x = room.sums.data();
    apply_norm<false>(b.norm, x, {1, places, channels}, room.small.data(), room.in.data(), 0);
    const Lanes scale = fill(1 / std::sqrt(static_cast<float>(width)));
    convolve(b.first, room.in.data(), 0, 1, places, [&](int64_t, int64_t p, int64_t n, Lanes first, Lanes last) {
        Bf16* to = room.rest.data() + p * 2 * channels + n - channels;
        if (n < channels) {
            to = room.queries.data() + (n / width * places + p) * width + n % width;
            first = mul(first, scale), last = mul(last, scale);
        }
        store_line(to, first, last);
    });
    for (int64_t head = 0; head < channels / width; head++) attend(head, width, grid, room, room.middle.data());
    convolve(b.second, room.middle.data(), 0, 1, places, Adder{x, places, channels});
}

// --- codes --------------------------------------------------------------------------------------------------------

// The first of the nearest codes of a level (D + 1, V') to z (D)
int64_t nearest(const Encoder& e, const float* codes, const float* z) {
    Lanes least = fill(std::numeric_limits<float>::infinity());
    Words which = no_words(), number = count_up();
    for (int64_t v = 0; v < e.num_codes; v += 16, number = add_words(number, fill_words(16))) {
        Lanes distance = load(codes + e.latent_dim * e.num_codes + v);
        for (int64_t d = 0; d < e.latent_dim; d++)
            distance = fmadd(fill(z[d]), load(codes + d * e.num_codes + v), distance);
        const Mask nearer = below(distance, least);
        least = pick(nearer, distance, least);
        which = pick_words(nearer, number, which);
    }
    const Mask best = same(least, fill(least_of(least)));
    return any(best) ? least_word(best, which) : 0;  // no distance is a number
}

// The nearest codes to z (D) level by level, in one number; z becomes what the levels before the last leave over
int64_t code_of(const Encoder& e, float* z) {
    int64_t id = 0;
    for (int64_t level = 0; level < e.levels; level++) {
        const float* codes = e.codes + level * (e.latent_dim + 1) * e.num_codes;
        const int64_t code = nearest(e, codes, z);
        id = id * e.codebook_size + code;
        if (level + 1 < e.levels)
            for (int64_t d = 0; d < e.latent_dim; d++) z[d] += 0.5f * codes[d * e.num_codes + code];
    }
    return id;
}

void encode_picture(const Encoder& e, const Pictures& p, int64_t picture, Room& room, float* latents, int64_t* ids) {
    Grid grid{p.height / e.patch, p.width / e.patch, e.conv_in.outputs};
    room.fit(e, grid);
    const Grid bands{grid.height, grid.width, e.conv_in.inputs};
    to_bands(e, p, picture, bands, room.small.data(), room.in.data());
    float* x = room.sums.data();
    // not by tiles: bands are wide apart in size, and sums of them would be rounded more than they
    convolve(e.conv_in, room.in.data(), bands.line(), grid.height, grid.width, Putter{x, grid.width, grid.channels});
    for (const Block* b = e.blocks; b < e.blocks + e.num_blocks; b++) {
        if (b->kind == RESIDUAL) residual(*b, grid, room);
        if (b->kind == DOWN) grid = downsample(*b, grid, room);
        if (b->kind == ATTENTION) attention(*b, e.head_dim, grid, room);
    }
    const int64_t places = grid.places();
    apply_norm<true>(e.norm_out, x, {1, places, grid.channels}, room.small.data(), room.in.data(), 0);
    convolve(e.conv_out, room.in.data(), 0, 1, places, Putter{x, places, e.conv_out.outputs});
    for (int64_t i = 0; i < places; i++) {
        float* z = x + i * e.conv_out.outputs;
        if (!e.codes) {
            std::copy_n(z, e.latent_dim, latents + (picture * places + i) * e.latent_dim);
            continue;
        }
        float squares = 0;
        for (int64_t d = 0; d < e.latent_dim; d++) squares += z[d] * z[d];
        const float length = e.unit ? std::max(std::sqrt(squares), 1e-12f) : 1.0f;
        for (int64_t d = 0; d < e.latent_dim; d++) z[d] /= length;
        ids[picture * places + i] = code_of(e, z);
    }
}

}  // namespace

extern "C" {

// -> ids (B, h w), or latents (B, h w, D) float32 where the encoder has no codes
void encode(const Encoder* encoder, const Pictures* pictures, float* latents, int64_t* ids, int threads) {
    std::atomic<int64_t> next{0};
    in_parallel(threads, [&](int64_t, int64_t) {
        static thread_local Room own;
        Room& room = once(own);
        for (int64_t i; (i = next.fetch_add(1)) < pictures->number;)
            encode_picture(*encoder, *pictures, i, room, latents, ids);
    });
}

}  // extern "C"
