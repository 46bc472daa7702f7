// A block of the generator, forward and backward, in one call each: what dalle/model.py's Block computes in training.
//
// A thread takes whole sequences, so what lies between two products stays in its cache. Each has sums of the weights'
// gradients of its own, added up at the end: for a given number of threads, results are the same every time.
// The residual stream is float32; products are of bfloat16 with float32 sums.

#include <array>

#include "abi.h"
#include "team.h"
#include "train_attention.h"

extern "C" {

struct Input {
    const float *x, *table;                 // (B, L, D), (2, L, K): cosines and signed sines
    const float* bias;                      // (B, L): 0, or -inf where a key is padding; or null
    const Bf16 *attention_mask, *ffn_mask;  // (B, L, D): factors of what the two branches add; or null
};

struct Kept {             // of the forward pass for the backward one
    Bf16 *qkv, *gate_up;  // (B, N / 32, L, 32), gates and factors in turns of 16: read again a group at a time
    Bf16* attended;       // (B, L, H K)
    Bf16 *first, *last;   // (B, L, D): normed, before the attention and before the feed-forward network
    float *scales, *lse;  // (2, B, L) of the norms, (B, H, L) logarithms of the softmax's sums
};

}  // extern "C"

EXPORT_ABI(sizeof(Shape), sizeof(Weights), sizeof(Input), sizeof(Kept))

namespace {

struct Size {
    int64_t rows, columns;  // gains are one row
};

constexpr int64_t MATRICES = 4, GATE_UP = 2;  // of the weights

// Of the weights, in their order
std::array<Size, 8> sizes_of(const Shape& s) {
    return {{{s.qkv(), s.dim},
             {s.dim, s.inner()},
             {2 * s.ffn, s.dim},
             {s.dim, s.ffn},
             {1, s.dim},
             {1, s.dim},
             {1, s.head_dim},
             {1, s.head_dim}}};
}

struct Sums {  // gradients of the weights, of one thread; those of matrices in blocks as `add_outer` has them
    Floats all;
    Weights parts;

    void clear(const Shape& s) {
        int64_t total = 0, part = 0;
        for (const Size& size : sizes_of(s)) total += size.rows * size.columns;
        float* at = room(all, total);
        std::fill_n(at, total, 0.0f);
        for (const Size& size : sizes_of(s)) parts.all()[part++] = at, at += size.rows * size.columns;
    }
};

constexpr int64_t CHUNK = 96;  // rows that stay in the cache on the way back through the ffn, an even number

struct Room {  // of a thread, for a sequence
    HeadRoom heads;
    Halves rows, hidden, given, wide, left, right, hidden_pairs;
    Floats back, middle;
};

Packed packed;  // of the block at hand
std::vector<Sums> sums;

// A sequence's part of everything
struct Part {
    const float *x, *next;
    Sequence sequence;
    const Bf16 *attention_mask, *ffn_mask;
    Bf16 *qkv, *attended, *gate_up, *first, *last;
    float *first_scales, *last_scales, *lse;

    Part(const Shape& s, const Input& in, const Kept& k, int64_t i)
        : x(in.x ? in.x + i * s.length * s.dim : nullptr),
          next(in.x && i + 1 < s.batch ? x + s.length * s.dim : nullptr),
          sequence{s.length, in.table, in.table + s.length * s.head_dim, in.bias ? in.bias + i * s.length : nullptr},
          attention_mask(in.attention_mask ? in.attention_mask + i * s.length * s.dim : nullptr),
          ffn_mask(in.ffn_mask ? in.ffn_mask + i * s.length * s.dim : nullptr),
          qkv(k.qkv + i * s.length * s.qkv()),
          attended(k.attended + i * s.length * s.inner()),
          gate_up(k.gate_up + i * s.length * 2 * s.ffn),
          first(k.first + i * s.length * s.dim),
          last(k.last + i * s.length * s.dim),
          first_scales(k.scales + i * s.length),
          last_scales(k.scales + (s.batch + i) * s.length),
          lse(k.lse + i * s.length * s.heads) {}
};

auto put_halves(Bf16* to, int64_t width) {
    return [=](int64_t row, int64_t n, Lanes first, Lanes last) { store_line(to + row * width + n, first, last); };
}

auto put_groups(Bf16* to, int64_t length) {
    return [=](int64_t row, int64_t n, Lanes first, Lanes last) {
        store_line(to + n * length + row * GROUP, first, last);
    };
}

auto put_sum(const float* x, const Bf16* mask, float* y, int64_t width) {
    return [=](int64_t row, int64_t n, Lanes first, Lanes last) {
        const int64_t at = row * width + n;
        if (mask) first = mul(first, widen(mask + at)), last = mul(last, widen(mask + at + 16));
        put16(y + at, add(load(x + at), first));
        put16(y + at + 16, add(load(x + at + 16), last));
    };
}

void forward_sequence(const Shape& s, const Weights& w, const Part& p, Room& r, float* y) {
    const int64_t L = s.length;
    Bf16* hidden = room(r.hidden, L * s.ffn);
    float* middle = room(r.middle, L * s.dim);
    norm_rows(p.x, L, s.dim, s.eps, p.first, p.first_scales);
    packed.qkv.multiply(p.first, L, put_groups(p.qkv, L));
    attend_forward(s, w, p.sequence, r.heads, p.qkv, p.attended, p.lse);
    packed.out.multiply(p.attended, L, put_sum(p.x, p.attention_mask, middle, s.dim));
    norm_rows(middle, L, s.dim, s.eps, p.last, p.last_scales);
    packed.gate_up.multiply(p.last, L, [&](int64_t row, int64_t n, Lanes gate, Lanes factor) {
        put_groups(p.gate_up, L)(row, n, gate, factor);
        store_bf16(hidden + row * s.ffn + n / 2, mul(mul(gate, sigmoid_few(gate)), factor));
    });
    Coming next(p.next, L * s.dim, L * s.dim / GROUP);
    packed.down.multiply(hidden, L, meanwhile(next, put_sum(middle, p.ffn_mask, y, s.dim)));
}

void round_rows(const float* x, const Bf16* mask, int64_t size, Bf16* y) {
    for (int64_t i = 0; i < size; i += 16) {
        const Lanes part = load(x + i);
        store_bf16(y + i, mask ? mul(part, widen(mask + i)) : part);
    }
}

void pair_all(const Bf16* x, int64_t length, int64_t width, Halves& to) {
    const int64_t pairs = (length + 1) / 2;
    pair_rows(in_rows(x, width), length, pairs, width, room(to, pairs * width * 2), pairs);
}

// Back through 16 gates and their factors: what comes to their product, of which silu(gate) is a part, and that product
Line ungate(const Bf16* gate_up, Lanes given, Lanes& hidden) {
    const Lanes one = fill(1.0f), gate = widen(gate_up), factor = widen(gate_up + 16);
    const Lanes sigmoid = sigmoid_few(gate), silu = mul(gate, sigmoid);
    const Lanes slope = fmadd(silu, sub(one, sigmoid), sigmoid);
    hidden = mul(silu, factor);
    return line_of(mul(mul(given, factor), slope), mul(given, silu));
}

// Some rows, few enough for the cache, from `first`, an even number, on: r.given (L, D) -> r.back (L, D), which comes
// to the norm's result, and what the products with weights were of as paired rows
void backward_ffn_rows(const Shape& s, const Part& p, Room& r, int64_t first, int64_t count) {
    const int64_t pairs = (s.length + 1) / 2, line = GROUP * s.length;
    Bf16* wide = room(r.wide, CHUNK * 2 * s.ffn);
    Line even[3];  // of the row before
    packed.down.multiply(r.given.data() + first * s.dim, count, [&](int64_t row, int64_t n, Lanes low, Lanes high) {
        const Bf16* gate_up = p.gate_up + 2 * n * s.length + (first + row) * GROUP;
        _mm_prefetch(gate_up + 2 * line, _MM_HINT_T0);
        _mm_prefetch(gate_up + 3 * line, _MM_HINT_T0);
        Lanes hidden[2];
        Line lines[3] = {ungate(gate_up, low, hidden[0]), ungate(gate_up + line, high, hidden[1])};
        lines[2] = line_of(hidden[0], hidden[1]);
        put_line(wide + row * 2 * s.ffn + 2 * n, lines[0]);
        put_line(wide + row * 2 * s.ffn + 2 * n + GROUP, lines[1]);
        const bool odd = row % 2;
        if (!odd && row + 1 < count) {
            std::copy_n(lines, 3, even);
            return;
        }
        const Line none = no_line();
        Bf16* left = r.left.data() + (2 * n * pairs + (first + row) / 2 * GROUP) * 2;
        Bf16* right = r.hidden_pairs.data() + (n * pairs + (first + row) / 2 * GROUP) * 2;
        store_pairs(left, odd ? even[0] : lines[0], odd ? lines[0] : none);
        store_pairs(left + 2 * GROUP * pairs, odd ? even[1] : lines[1], odd ? lines[1] : none);
        store_pairs(right, odd ? even[2] : lines[2], odd ? lines[2] : none);
    });
    Coming last(p.last + first * s.dim, count * s.dim, count * s.dim / GROUP);
    packed.gate_up.multiply(wide, count, meanwhile(last, put_floats(r.back.data() + first * s.dim, s.dim)));
}

// dy (L, D) -> r.middle: what comes to the sum after the attention, and r.rows, what of it comes to the attention
void backward_ffn(const Shape& s, const Weights& w, const Weights& by, const Part& p, Room& r, const float* dy) {
    const int64_t L = s.length, pairs = (L + 1) / 2;
    room(r.back, L * s.dim), room(r.left, pairs * 4 * s.ffn), room(r.hidden_pairs, pairs * 2 * s.ffn);
    round_rows(dy, p.ffn_mask, L * s.dim, room(r.given, L * s.dim));
    for (int64_t first = 0; first < L; first += CHUNK) backward_ffn_rows(s, p, r, first, std::min(CHUNK, L - first));
    pair_all(p.last, L, s.dim, r.right);
    add_outer<false>(r.left.data(), 2 * s.ffn, r.right.data(), s.dim, pairs, by.gate_up);
    pair_all(r.given.data(), L, s.dim, r.left);
    add_outer<false>(r.left.data(), s.dim, r.hidden_pairs.data(), s.ffn, pairs, by.down);
    float* middle = room(r.middle, L * s.dim);
    Bf16* rows = room(r.rows, L * s.dim);
    for (int64_t t = 0, at = 0; t < L; t++, at += s.dim) {
        unnorm_row(p.last + at, p.last_scales[t], r.back.data() + at, s.dim, dy + at, middle + at);
        round_rows(middle + at, p.attention_mask ? p.attention_mask + at : nullptr, s.dim, rows + at);
    }
}

void backward_attention(const Shape& s, const Weights& w, const Weights& by, const Part& p, Room& r, float* dx) {
    const int64_t L = s.length, pairs = (L + 1) / 2;
    Bf16 *given = room(r.given, L * s.inner()), *wide = room(r.wide, L * s.qkv());
    float* back = room(r.back, L * s.dim);
    Coming attended(p.attended, L * s.inner(), L * s.inner() / GROUP);
    packed.out.multiply(r.rows.data(), L, meanwhile(attended, put_halves(given, s.inner())));
    pair_all(r.rows.data(), L, s.dim, r.left);
    pair_all(p.attended, L, s.inner(), r.right);
    add_outer<false>(r.left.data(), s.dim, r.right.data(), s.inner(), pairs, by.out);
    attend_backward(s, w, by, p.sequence, r.heads, p.qkv, p.attended, p.lse, given, wide);
    Coming normed(p.first, L * s.dim, L * s.dim / GROUP);
    packed.qkv.multiply(wide, L, meanwhile(normed, put_floats(back, s.dim)));
    pair_all(wide, L, s.qkv(), r.left);
    pair_all(p.first, L, s.dim, r.right);
    add_outer<false>(r.left.data(), s.qkv(), r.right.data(), s.dim, pairs, by.qkv);
    for (int64_t t = 0, at = 0; t < L; t++, at += s.dim)
        unnorm_row(p.first + at, p.first_scales[t], back + at, s.dim, r.middle.data() + at, dx + at);
}

// The gradients of a matrix, rows of one after the other, from all threads into one that PyTorch sees
void add_up_matrix(const Shape& s, int64_t part, const float* weight, const float* gain, float* gradient,
                   float* by_gain, int64_t thread, int64_t threads) {
    const Size size = sizes_of(s)[part];
    const Range rows = share(size.rows, thread, threads);
    for (int64_t n = rows.begin; n < rows.end; n++) {
        const int64_t row = (part == GATE_UP ? turn_of(n, s.ffn) : n) * size.columns;
        for (int64_t k = 0; k < size.columns; k += 16) {
            const int64_t block = k / GROUP * GROUP * size.rows + block_row(n) + k % GROUP;
            Lanes sum = zeros();
            for (int64_t t = 0; t < threads; t++)
                sum = add(sum, load(sums[t].parts.all()[part] + block));
            if (gain) sum = by_gained(sum, weight + row + k, gain + k, by_gain + k);
            put16(gradient + row + k, sum);
        }
    }
}

void add_up(const Shape& s, const Weights& w, const Weights& gradients, int64_t thread, int64_t threads) {
    const Weights& by = sums[thread].parts;
    add_up_matrix(s, 0, w.qkv, w.attention_norm, gradients.qkv, by.attention_norm, thread, threads);
    add_up_matrix(s, 1, w.out, nullptr, gradients.out, nullptr, thread, threads);
    add_up_matrix(s, 2, w.gate_up, w.ffn_norm, gradients.gate_up, by.ffn_norm, thread, threads);
    add_up_matrix(s, 3, w.down, nullptr, gradients.down, nullptr, thread, threads);
    barrier();
    if (thread) return;
    for (int64_t part = MATRICES; part < static_cast<int64_t>(sizes_of(s).size()); part++)
        for (int64_t k = 0; k < sizes_of(s)[part].columns; k++) {
            float sum = 0;
            for (int64_t t = 0; t < threads; t++) sum += sums[t].parts.all()[part][k];
            gradients.all()[part][k] = sum;
        }
}

}  // namespace

extern "C" {

// x -> y (B, L, D), and what the backward pass needs
void block_forward(const Shape* shape, const Weights* weights, const Input* input, const Kept* kept, float* y,
                   int threads) {
    const Shape& s = *shape;
    packed.fit(s, false);
    in_parallel(threads, [&](int64_t thread, int64_t all) {
        static thread_local Room own;
        Room& room = once(own);
        packed.pack(s, *weights, thread, all);
        barrier();
        const Range mine = equal_share(s.batch, thread, all);
        for (int64_t i = mine.begin; i < mine.end; i++)
            forward_sequence(s, *weights, Part(s, *input, *kept, i), room, y + i * s.length * s.dim);
    });
}

// dy -> dx (B, L, D), and the gradients of the weights
void block_backward(const Shape* shape, const Weights* weights, const Input* input, const Kept* kept, const float* dy,
                    float* dx, const Weights* gradients, int threads) {
    const Shape& s = *shape;
    packed.fit(s, true);
    sums.resize(std::max<size_t>(sums.size(), threads));
    in_parallel(threads, [&](int64_t thread, int64_t all) {
        static thread_local Room own;
        Room& room = once(own);
        packed.pack(s, *weights, thread, all);
        sums[thread].clear(s);
        barrier();
        const Range mine = equal_share(s.batch, thread, all);
        for (int64_t i = mine.begin; i < mine.end; i++) {
            const Part part(s, *input, *kept, i);
            backward_ffn(s, *weights, sums[thread].parts, part, room, dy + i * s.length * s.dim);
            backward_attention(s, *weights, sums[thread].parts, part, room, dx + i * s.length * s.dim);
        }
        barrier();  // all sums are there
        add_up(s, *weights, *gradients, thread, all);
    });
}

}  // extern "C"
