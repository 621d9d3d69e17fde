// Both directions of an LSTM over all steps, forward and backward, in fp32. Built and called by lstm.py.
//
// Sequences are independent, so a thread takes ROWS of them, in one direction, through all steps: no thread waits for
// another, and the bits of a result depend on neither the number of threads nor the other sequences. The state stays in
// cache; the weights, packed so that a tile reads them in order, come from the second-level cache.
//
// Arrays, row-major: x [R, T, F], out and dout [R, T, 2, H], gates [R, T, 2, 4, H] (input, forget, cell, output; the
// backward pass replaces the gates by their gradients), cells [R, T, 2, H]. H is a multiple of 4 WIDTH; rows of the state are WIDTH further
// apart than they need be, because at a power of two they would share a few lines of the cache.

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

constexpr long WIDTH = 16, ROWS = 24;
#ifdef __AVX512F__
constexpr long TILE = 6;  // 24 of 32 registers accumulate
#else
constexpr long TILE = 1;
#endif

typedef float vec __attribute__((vector_size(4 * WIDTH)));
typedef int ivec __attribute__((vector_size(4 * WIDTH)));

inline vec load(const float* from) {
    vec value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

inline void store(float* to, vec value) { std::memcpy(to, &value, sizeof value); }

// 2^n p(r) with x = n ln 2 + r, |r| <= ln 2 / 2; p has a relative error near one unit in the last place.
inline vec exp(vec x) {
    x = x > 87.0f ? vec{} + 87.0f : x;
    x = x < -87.0f ? vec{} - 87.0f : x;
    const vec shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer is in the low bits
    const vec n = shifted - 12582912.0f;
    const vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vec p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    return (vec)((ivec)p + ((ivec)shifted << 23));
}

inline vec sigmoid(vec x) { return 1.0f / (1.0f + exp(-x)); }

inline vec tanh(vec x) {
    const vec square = x * x;  // near zero the quotient would cancel: the series instead
    vec series = square * (62.0f / 2835) - 17.0f / 315;
    series = series * square + 2.0f / 15;
    series = (series * square - 1.0f / 3) * square * x + x;
    return square < 0.04f ? series : 1.0f - 2.0f / (exp(2.0f * x) + 1.0f);
}

struct Sizes {
    long rows, steps, features, hidden;
};

// Adds rows [TILE, depth], `stride` apart, times weights [depth, 4, WIDTH]. Not inlined, to have all registers.
__attribute__((noinline)) void add_product(vec (&sums)[TILE][4], const float* rows, long stride, const float* weights,
                                           long depth) {
    vec local[TILE][4];
    std::memcpy(local, sums, sizeof sums);
    for (long k = 0; k < depth; ++k, weights += 4 * WIDTH) {
        const vec w0 = load(weights), w1 = load(weights + WIDTH), w2 = load(weights + 2 * WIDTH),
                  w3 = load(weights + 3 * WIDTH);
#pragma GCC unroll 8
        for (long m = 0; m < TILE; ++m) {
            const float value = rows[m * stride + k];
            local[m][0] += value * w0;
            local[m][1] += value * w1;
            local[m][2] += value * w2;
            local[m][3] += value * w3;
        }
    }
    std::memcpy(sums, local, sizeof sums);
}

// `count` sequences from `first` on. weights [H / WIDTH, F + H, 4, WIDTH] of this direction, bias [4, H].
void forward(const Sizes& s, long direction, long first, long count, const float* x, const float* weights,
             const float* bias, float* gates, float* cells, float* out) {
    const long F = s.features, H = s.hidden, depth = F + H, stride = depth + WIDTH;
    std::vector<float> inputs(ROWS * stride), next(ROWS * H), state(ROWS * H);
    for (long step = 0; step < s.steps; ++step) {
        const long t = direction ? s.steps - 1 - step : step;
        for (long r = 0; r < count; ++r) {
            std::copy_n(x + ((first + r) * s.steps + t) * F, F, &inputs[r * stride]);
            std::copy_n(&next[r * H], H, &inputs[r * stride + F]);
        }
        for (long u = 0; u < H; u += WIDTH) {
            for (long tile = 0; tile < count; tile += TILE) {
                vec sums[TILE][4];
                for (long m = 0; m < TILE; ++m)
                    for (long g = 0; g < 4; ++g) sums[m][g] = load(bias + g * H + u);
                add_product(sums, &inputs[tile * stride], stride, weights + u * depth * 4, depth);
                for (long r = tile; r < std::min(tile + TILE, count); ++r) {
                    const vec* sum = sums[r - tile];
                    const vec i = sigmoid(sum[0]), f = sigmoid(sum[1]), g = tanh(sum[2]), o = sigmoid(sum[3]);
                    const vec c = f * load(&state[r * H + u]) + i * g, h = o * tanh(c);
                    store(&state[r * H + u], c);
                    store(&next[r * H + u], h);
                    const long at = (((first + r) * s.steps + t) * 2 + direction) * H + u;
                    store(out + at, h);
                    if (!gates) continue;
                    store(cells + at, c);
                    float* const gate = gates + 4 * (at - u) + u;
                    store(gate, i), store(gate + H, f), store(gate + 2 * H, g), store(gate + 3 * H, o);
                }
            }
        }
    }
}

// The gradients of the gates' inputs in place of the gates. weights [H / (4 WIDTH), 4 H, 4, WIDTH] of this direction.
void backward(const Sizes& s, long direction, long first, long count, const float* dout, const float* weights,
              const float* cells, float* gates) {
    const long H = s.hidden, stride = 4 * H + WIDTH;
    std::vector<float> dgates(ROWS * stride), dh(ROWS * H), dc(ROWS * H), zeros(H);
    for (long step = s.steps - 1; step >= 0; --step) {
        const long t = direction ? s.steps - 1 - step : step;
        for (long r = 0; r < count; ++r) {
            const long at = (((first + r) * s.steps + t) * 2 + direction) * H;
            const float* const before = step ? cells + at + (direction ? 2 * H : -2 * H) : zeros.data();
            for (long u = 0; u < H; u += WIDTH) {
                float* const gate = gates + 4 * at + u;
                const vec i = load(gate), f = load(gate + H), g = load(gate + 2 * H), o = load(gate + 3 * H);
                const vec c = tanh(load(cells + at + u)), d = load(&dh[r * H + u]) + load(dout + at + u);
                const vec e = load(&dc[r * H + u]) + d * o * (1.0f - c * c);
                store(&dc[r * H + u], e * f);
                const vec grads[4] = {e * g * i * (1.0f - i), e * load(before + u) * f * (1.0f - f),
                                      e * i * (1.0f - g * g), d * c * o * (1.0f - o)};
                for (long k = 0; k < 4; ++k) {
                    store(gate + k * H, grads[k]);
                    store(&dgates[r * stride + k * H + u], grads[k]);
                }
            }
        }
        for (long u = 0; u < H && step; u += 4 * WIDTH) {
            for (long tile = 0; tile < count; tile += TILE) {
                vec sums[TILE][4] = {};
                add_product(sums, &dgates[tile * stride], stride, weights + u * 4 * H, 4 * H);
                for (long m = 0; m < TILE; ++m) std::memcpy(&dh[(tile + m) * H + u], sums[m], sizeof sums[m]);
            }
        }
    }
}

// Asks for huge pages for fresh memory that is about to be filled: faults of 4 KiB cost a tenth of a step.
void advise(const float* from, long size) {
#ifdef MADV_HUGEPAGE
    const auto begin = ((uintptr_t)from + 4095) / 4096 * 4096, end = (uintptr_t)(from + size) / 4096 * 4096;
    if (from && end > begin) madvise((void*)begin, end - begin, MADV_HUGEPAGE);  // a wish: no matter if refused
#endif
}

template <typename Work>
void share(const Sizes& s, long num_threads, Work work) {
    const long groups = (s.rows + ROWS - 1) / ROWS;
    std::atomic<long> taken{0};
    auto run = [&] {
        for (long item; (item = taken++) < 2 * groups;) {
            const long first = item / 2 * ROWS;
            work(item % 2, first, std::min(ROWS, s.rows - first));
        }
    };
    std::vector<std::thread> threads;
    for (long n = 1; n < std::min(num_threads, 2 * groups); ++n) threads.emplace_back(run);
    run();
    for (auto& thread : threads) thread.join();
}

}  // namespace

// gates and cells are null where no gradient is wanted.
extern "C" void lstm_forward(long rows, long steps, long features, long hidden, long num_threads, const float* x,
                             const float* weights, const float* bias, float* gates, float* cells, float* out) {
    const Sizes s{rows, steps, features, hidden};
    advise(gates, gates ? rows * steps * 8 * hidden : 0);
    advise(cells, cells ? rows * steps * 2 * hidden : 0);
    advise(out, rows * steps * 2 * hidden);
    share(s, num_threads, [&](long direction, long first, long count) {
        forward(s, direction, first, count, x, weights + direction * 4 * hidden * (features + hidden),
                bias + direction * 4 * hidden, gates, cells, out);
    });
}

extern "C" void lstm_backward(long rows, long steps, long hidden, long num_threads, const float* dout,
                              const float* weights, const float* cells, float* gates) {
    const Sizes s{rows, steps, 0, hidden};
    share(s, num_threads, [&](long direction, long first, long count) {
        backward(s, direction, first, count, dout, weights + direction * 4 * hidden * hidden, cells, gates);
    });
}
