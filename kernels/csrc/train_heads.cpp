// The end of the generator in training, forward and backward: the last norm, the products with the heads' weights, and
// cross-entropies of their logits.
//
// Rows are taken a block at a time, which stays in a thread's cache. Results are the same every time for a given number
// of threads.

#include <limits>

#include "abi.h"
#include "team.h"
#include "train_parts.h"

extern "C" {

struct Hidden {  // what comes out of the last block, and the norm's gain
    const float *x, *gain;
    int64_t rows, dim;
    float eps;
};

struct Head {
    const float* weight;   // (V, D)
    const int64_t* rows;   // (M): which of x
    Bf16* logits;          // (M, V), or their gradient
    float* gradient;       // (V, D): of the weight
    int64_t count, width;  // M, V
};

}  // extern "C"

EXPORT_ABI(sizeof(Hidden), sizeof(Head))

namespace {

constexpr int64_t ROWS = 252;     // of a block, whole tiles
constexpr int64_t SOME = 4096;    // outputs of a head that are summed over at a time, and
constexpr int64_t COLUMNS = 256;  // those whose weights' gradients are: whole groups

struct Room {  // of a thread
    Halves normed, left;
    Floats scales, back, sums;
};

struct Blocks {  // of rows: as many for every thread
    int64_t rows, count;
    Blocks(int64_t rows, int64_t threads)
        : rows(rows), count((rows + ROWS * threads - 1) / (ROWS * threads) * threads) {}
    Range at(int64_t block) const { return share(rows, block, count); }
};

Matrix packed;                 // of the head at hand
Halves paired;                 // its rows, normed: of each block (D / 32, ROWS / 2, 32, 2)
std::vector<Floats> by_gains;  // of each thread

// Rows of the last hidden states, normed; 1 / rms of each goes to room.scales
const Bf16* norm_block(const Hidden& h, const Head& head, Range rows, Room& r) {
    Bf16* to = room(r.normed, ROWS * h.dim);
    float* scales = room(r.scales, ROWS);
    for (int64_t i = rows.begin; i < rows.end; i++)
        norm_rows(h.x + head.rows[i] * h.dim, 1, h.dim, h.eps, to + (i - rows.begin) * h.dim, scales + i - rows.begin);
    return to;
}

void forward_block(const Hidden& h, const Head& head, Range rows, Room& r) {
    const Bf16* normed = norm_block(h, head, rows, r);
    Bf16* logits = head.logits + rows.begin * head.width;
    packed.multiply(normed, rows.end - rows.begin, [&](int64_t row, int64_t n, Lanes first, Lanes last) {
        Bf16* to = logits + row * head.width + n;
        if (n + GROUP <= head.width) return store_line(to, first, last);
        put_some_line(to, head.width - n, line_of(first, last));
    });
}

void fit_backward(const Hidden& h, const Head& head, int64_t threads) {
    packed.fit(head.width, h.dim, true);
    room(paired, Blocks(head.count, threads).count * ROWS * h.dim);
}

// Into dx; keeps the rows, normed and paired
void backward_block(const Hidden& h, const Head& head, int64_t block, Range rows, Room& r, float* dx) {
    const int64_t count = rows.end - rows.begin, pairs = (count + 1) / 2, D = h.dim, V = head.width;
    const Bf16* normed = norm_block(h, head, rows, r);
    pair_rows(in_rows(normed, D), count, pairs, D, paired.data() + block * ROWS * D, pairs);
    float* back = room(r.back, ROWS * D);
    std::fill_n(back, count * D, 0.0f);
    for (int64_t begin = 0; begin < V; begin += SOME)
        packed.multiply_some(head.logits + rows.begin * V + begin, count, V, begin, std::min(SOME, V - begin),
                             [&](int64_t row, int64_t n, Lanes first, Lanes last) {
                                 float* to = back + row * D + n;
                                 put16(to, add(load(to), first));
                                 put16(to + 16, add(load(to + 16), last));
                             });
    for (int64_t i = 0; i < count; i++) {
        const int64_t at = head.rows[rows.begin + i] * D;
        unnorm_row(normed + i * D, r.scales[i], back + i * D, D, dx + at, dx + at);
    }
}

// Rows `rows` of columns from `begin` on as paired rows, zeros beyond the last column
void pair_columns(const Head& head, Range rows, int64_t begin, int64_t columns, Bf16* to) {
    const int64_t count = rows.end - rows.begin, pairs = (count + 1) / 2;
    const Bf16* from = head.logits + rows.begin * head.width + begin;
    const int64_t inside = std::min(columns, (head.width - begin) / GROUP * GROUP);
    pair_rows({from, head.width, GROUP}, count, pairs, inside, to, pairs);
    if (inside == columns) return;
    Bf16 last[ROWS * GROUP] = {};
    for (int64_t i = 0; i < count; i++)
        std::copy(from + i * head.width + inside, from + (i + 1) * head.width - begin, last + i * GROUP);
    pair_rows(in_rows(last, GROUP), count, pairs, GROUP, to + inside * pairs * 2, pairs);
}

// Gradients of some rows of the weight
void backward_weight(const Hidden& h, const Head& head, const Blocks& blocks, int64_t begin, int64_t columns, Room& r,
                     float* by_gain) {
    const int64_t D = h.dim;
    Bf16* left = room(r.left, ROWS * columns);
    float* sums = room(r.sums, columns * D);
    std::fill_n(sums, columns * D, 0.0f);
    for (int64_t block = 0; block < blocks.count; block++) {
        const Range rows = blocks.at(block);
        pair_columns(head, rows, begin, columns, left);
        add_outer<false>(left, columns, paired.data() + block * ROWS * D, D, (rows.end - rows.begin + 1) / 2, sums);
    }
    for (int64_t n = 0; n < std::min(columns, head.width - begin); n++)
        for (int64_t k = 0; k < D; k += 16) {
            const int64_t row = (begin + n) * D;
            const Lanes by = load(sums + k / GROUP * GROUP * columns + block_row(n) + k % GROUP);
            put16(head.gradient + row + k, by_gained(by, head.weight + row + k, h.gain + k, by_gain + k));
        }
}

// All of a head's backward pass that a thread does
void backward_head(const Hidden& h, const Head& head, int64_t thread, int64_t threads, Room& r, float* dx) {
    const Blocks blocks(head.count, threads);
    const Range mine = share(blocks.count, thread, threads),
                groups = share(whole_groups(head.width) / GROUP, thread, threads);
    for (int64_t block = mine.begin; block < mine.end; block++) backward_block(h, head, block, blocks.at(block), r, dx);
    barrier();
    for (int64_t begin = groups.begin * GROUP; begin < groups.end * GROUP; begin += COLUMNS)
        backward_weight(h, head, blocks, begin, std::min(COLUMNS, groups.end * GROUP - begin), r,
                        by_gains[thread].data());
}

}  // namespace

extern "C" {

void heads_forward(const Hidden* hidden, const Head* heads, int64_t count, int threads) {
    for (const Head* head = heads; head < heads + count; head++) {
        packed.fit(head->width, hidden->dim, false);
        in_parallel(threads, [&](int64_t thread, int64_t all) {
            static thread_local Room own;
            Room& room = once(own);
            packed.pack(head->weight, {0, hidden->gain}, thread, all);
            barrier();
            const Blocks blocks(head->count, all);
            const Range mine = share(blocks.count, thread, all);
            for (int64_t block = mine.begin; block < mine.end; block++)
                forward_block(*hidden, *head, blocks.at(block), room);
        });
    }
}

// dx (R, D), and the gradients of the gain and of the heads' weights
void heads_backward(const Hidden* hidden, const Head* heads, int64_t count, float* dx, float* by_gain, int threads) {
    const int64_t D = hidden->dim;
    by_gains.resize(std::max<size_t>(by_gains.size(), threads));
    for (Floats& by : by_gains) by.assign(D, 0.0f);
    in_parallel(threads, [&](int64_t thread, int64_t all) {
        static thread_local Room own;
        Room& room = once(own);
        const Range mine = share(hidden->rows * D, thread, all);
        std::fill(dx + mine.begin, dx + mine.end, 0.0f);
        for (const Head* head = heads; head < heads + count; head++) {
            barrier();
            if (thread == 0) fit_backward(*hidden, *head, all);
            barrier();
            packed.pack(head->weight, {0, hidden->gain}, thread, all);
            barrier();
            backward_head(*hidden, *head, thread, all, room, dx);
        }
    });
    for (int64_t k = 0; k < D; k++) {
        by_gain[k] = 0;
        for (int t = 0; t < threads; t++) by_gain[k] += by_gains[t][k];
    }
}

// Cross-entropies: logits (M, V) bfloat16, targets (M) -> losses and logarithms of the softmax's sums (M); false for a
// target out of range
bool entropy_forward(const Bf16* logits, const int64_t* targets, int64_t rows, int64_t width, float* losses, float* lse,
                     int threads) {
    if (std::any_of(targets, targets + rows, [=](int64_t target) { return target < 0 || target >= width; }))
        return false;
    const Lanes least = fill(-std::numeric_limits<float>::infinity());
    in_parallel(threads, [&](int64_t thread, int64_t all) {
        const Range mine = equal_share(rows, thread, all);
        for (int64_t row = mine.begin; row < mine.end; row++) {
            const Bf16* x = logits + row * width;
            Lanes most = least, total = zeros();
            for (int64_t i = 0; i < width; i += 16) most = larger(most, widen_some(first_lanes(width - i), x + i, least));
            const float top = most_of(most);
            for (int64_t i = 0; i < width; i += 16)
                total =
                    add(total, exp16(sub(widen_some(first_lanes(width - i), x + i, least), fill(top))));
            lse[row] = top + std::log(sum_of(total));
            const int32_t bits = static_cast<int32_t>(x[targets[row]]) << 16;
            losses[row] = lse[row] - _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(bits)));
        }
    });
    return true;
}

// Their gradient: dlosses (M) -> dlogits (M, V) bfloat16
void entropy_backward(const Bf16* logits, const int64_t* targets, int64_t rows, int64_t width, const float* lse,
                      const float* dlosses, Bf16* dlogits, int threads) {
    const Words places = count_up();
    in_parallel(threads, [&](int64_t thread, int64_t all) {
        const Range mine = equal_share(rows, thread, all);
        for (int64_t row = mine.begin; row < mine.end; row++) {
            const Lanes scale = fill(dlosses[row]), binary = fill(LOG2_E);
            const Lanes above = fill(lse[row] * LOG2_E);
            for (int64_t i = 0; i < width; i += 16) {
                const int64_t at = row * width + i;
                const Lanes x = widen_some(first_lanes(width - i), logits + at, above);
                const Lanes p = power_of_two(fmsub(x, binary, above), 0xffff);
                const Mask hit = same_words(places, fill_words(targets[row] - i));
                const Lanes d = mul(pick(hit, sub(p, fill(1.0f)), p), scale);
                store_some_bf16(dlogits + at, first_lanes(width - i), d);
            }
        }
    });
}

}  // extern "C"
