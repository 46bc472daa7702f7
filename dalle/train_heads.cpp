// The end of the generator in training, forward and backward: the last norm, the products with the heads' weights, and
// cross-entropies of their logits.
//
// Rows are taken a block at a time, which stays in a thread's cache. Results are the same every time for a given number
// of threads.

#include <omp.h>

#include <limits>

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

// Of 16 numbers, those that are there
__mmask16 within(int64_t count) { return count >= 16 ? 0xffff : (1 << count) - 1; }

__m512 widen_some(const Bf16* from, int64_t count, __m512 rest) {
    const __m256i halves = _mm256_maskz_loadu_epi16(within(count), from);
    const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
    return _mm512_mask_mov_ps(rest, within(count), _mm512_castsi512_ps(wide));
}

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
    packed.multiply(normed, rows.end - rows.begin, [&](int64_t row, int64_t n, __m512 first, __m512 last) {
        Bf16* to = logits + row * head.width + n;
        if (n + GROUP <= head.width) return store_line(to, first, last);
        const __mmask32 there = (1u << (head.width - n)) - 1;
        _mm512_mask_storeu_epi16(to, there, (__m512i)_mm512_cvtne2ps_pbh(last, first));
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
                             [&](int64_t row, int64_t n, __m512 first, __m512 last) {
                                 float* to = back + row * D + n;
                                 _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), first));
                                 _mm512_storeu_ps(to + 16, _mm512_add_ps(_mm512_loadu_ps(to + 16), last));
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
            const __m512 by = _mm512_loadu_ps(sums + k / GROUP * GROUP * columns + block_row(n) + k % GROUP);
            _mm512_storeu_ps(head.gradient + row + k, by_gained(by, head.weight + row + k, h.gain + k, by_gain + k));
        }
}

// All of a head's backward pass that a thread does
void backward_head(const Hidden& h, const Head& head, int64_t thread, int64_t threads, Room& r, float* dx) {
    const Blocks blocks(head.count, threads);
    const Range mine = share(blocks.count, thread, threads),
                groups = share(whole_groups(head.width) / GROUP, thread, threads);
    for (int64_t block = mine.begin; block < mine.end; block++) backward_block(h, head, block, blocks.at(block), r, dx);
#pragma omp barrier
    for (int64_t begin = groups.begin * GROUP; begin < groups.end * GROUP; begin += COLUMNS)
        backward_weight(h, head, blocks, begin, std::min(COLUMNS, groups.end * GROUP - begin), r,
                        by_gains[thread].data());
}

}  // namespace

extern "C" {

void heads_forward(const Hidden* hidden, const Head* heads, int64_t count, int threads) {
    for (const Head* head = heads; head < heads + count; head++) {
        packed.fit(head->width, hidden->dim, false);
#pragma omp parallel num_threads(threads)
        {
            const int64_t thread = omp_get_thread_num(), all = omp_get_num_threads();
            static thread_local Room own;
            Room& room = once(own);
            packed.pack(head->weight, {0, hidden->gain}, thread, all);
#pragma omp barrier
            const Blocks blocks(head->count, all);
            const Range mine = share(blocks.count, thread, all);
            for (int64_t block = mine.begin; block < mine.end; block++)
                forward_block(*hidden, *head, blocks.at(block), room);
        }
    }
}

// dx (R, D), and the gradients of the gain and of the heads' weights
void heads_backward(const Hidden* hidden, const Head* heads, int64_t count, float* dx, float* by_gain, int threads) {
    const int64_t D = hidden->dim;
    by_gains.resize(std::max<size_t>(by_gains.size(), threads));
    for (Floats& by : by_gains) by.assign(D, 0.0f);
#pragma omp parallel num_threads(threads)
    {
        const int64_t thread = omp_get_thread_num(), all = omp_get_num_threads();
        static thread_local Room own;
        Room& room = once(own);
        const Range mine = share(hidden->rows * D, thread, all);
        std::fill(dx + mine.begin, dx + mine.end, 0.0f);
        for (const Head* head = heads; head < heads + count; head++) {
#pragma omp barrier
#pragma omp single
            fit_backward(*hidden, *head, all);
            packed.pack(head->weight, {0, hidden->gain}, thread, all);
#pragma omp barrier
            backward_head(*hidden, *head, thread, all, room, dx);
        }
    }
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
    const __m512 least = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const Bf16* x = logits + row * width;
        __m512 most = least, total = _mm512_setzero_ps();
        for (int64_t i = 0; i < width; i += 16) most = _mm512_max_ps(most, widen_some(x + i, width - i, least));
        const float top = _mm512_reduce_max_ps(most);
        for (int64_t i = 0; i < width; i += 16)
            total =
                _mm512_add_ps(total, exp512(_mm512_sub_ps(widen_some(x + i, width - i, least), _mm512_set1_ps(top))));
        lse[row] = top + std::log(_mm512_reduce_add_ps(total));
        const int32_t bits = static_cast<int32_t>(x[targets[row]]) << 16;
        losses[row] = lse[row] - _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(bits)));
    }
    return true;
}

// Their gradient: dlosses (M) -> dlogits (M, V) bfloat16
void entropy_backward(const Bf16* logits, const int64_t* targets, int64_t rows, int64_t width, const float* lse,
                      const float* dlosses, Bf16* dlogits, int threads) {
    const __m512i places = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const __m512 scale = _mm512_set1_ps(dlosses[row]), binary = _mm512_set1_ps(LOG2_E);
        const __m512 above = _mm512_set1_ps(lse[row] * LOG2_E);
        for (int64_t i = 0; i < width; i += 16) {
            const int64_t at = row * width + i;
            const __m512 x = widen_some(logits + at, width - i, above);
            const __m512 p = power_of_two(_mm512_fmsub_ps(x, binary, above), 0xffff);
            const __mmask16 hit = _mm512_cmpeq_epi32_mask(places, _mm512_set1_epi32(targets[row] - i));
            const __m512 d = _mm512_mul_ps(_mm512_mask_sub_ps(p, hit, p, _mm512_set1_ps(1.0f)), scale);
            _mm256_mask_storeu_epi16(dlogits + at, within(width - i), (__m256i)_mm512_cvtneps_pbh(d));
        }
    }
}

}  // extern "C"
