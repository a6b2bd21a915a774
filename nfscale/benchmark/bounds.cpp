// What one machine can do at most of the three things that a step is made of, on data in the nearest cache:
// multiply-adds in registers, sines with their cosines, and passes of an optimiser over weights and moments.
//
// Each function works on so many threads, each as much, and returns how much was done in all.

#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
typedef float V __attribute__((vector_size(64)));
INLINE V fused(V a, V b, V c) { return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int LANES = 8;
typedef float V __attribute__((vector_size(32)));
INLINE V fused(V a, V b, V c) { return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#else
constexpr int LANES = 4;
typedef float V __attribute__((vector_size(16)));
INLINE V fused(V a, V b, V c) { return a * b + c; }
#endif
typedef int32_t Words __attribute__((vector_size(4 * LANES)));

INLINE V load(const float* from) {
    V result;
    std::memcpy(&result, from, sizeof(V));
    return result;
}
INLINE void store(float* to, V a) { std::memcpy(to, &a, sizeof(V)); }
INLINE V same(float a) { return V{} + a; }

volatile float sink;

template <class Work>
void on_threads(int64_t threads, const Work& work) {
    std::vector<std::thread> others;
    for (int64_t i = 1; i < threads; i++) {
        others.emplace_back(work);
    }
    work();
    for (std::thread& other : others) {
        other.join();
    }
}

// sin(pi u) and cos(pi u), with the polynomials of the native step.
INLINE void sine(V& u, V& cosine) {
    constexpr float SINE[5] = {3.1415925f, -5.1677017f, 2.5499473f, -0.597557f, 0.07629661f};
    constexpr float COSINE[6] = {1.0f, -4.934802f, 4.058709f, -1.3352121f, 0.23493756f, -0.024396716f};
    const V rounder = same(12582912.0f);  // 1.5 * 2^23: the sum ends in the nearest integer
    const V rounded = u + rounder;
    const Words sign = (Words)rounded << 31;
    const V rest = u - (rounded - rounder), square = rest * rest;
    V value = fused(square, same(SINE[4]), same(SINE[3]));
    cosine = fused(square, same(COSINE[5]), same(COSINE[4]));
    for (int power = 2; power >= 0; power--) {
        value = fused(square, value, same(SINE[power]));
        cosine = fused(square, cosine, same(COSINE[power + 1]));
    }
    cosine = (V)((Words)fused(square, cosine, same(COSINE[0])) ^ sign);
    u = (V)((Words)(value * rest) ^ sign);
}

}  // namespace

extern "C" {

// Multiplications and additions.
double nfscale_products(int64_t rounds, int64_t threads) {
    constexpr int CHAINS = 12;  // more than latency times width of any processor that has 16 registers
    on_threads(threads, [=] {
        V sums[CHAINS];
        for (int i = 0; i < CHAINS; i++) {
            sums[i] = same(static_cast<float>(i));
        }
        const V a = same(0.999f), b = same(static_cast<float>(rounds & 1));
        for (int64_t round = 0; round < rounds; round++) {
            for (int i = 0; i < CHAINS; i++) {
                sums[i] = fused(sums[i], a, b);
            }
        }
        for (int i = 1; i < CHAINS; i++) {
            sums[0] = sums[0] + sums[i];
        }
        sink = sums[0][0];
    });
    return 2.0 * LANES * CHAINS * static_cast<double>(rounds) * static_cast<double>(threads);
}

// Sines, each with its cosine.
double nfscale_sines(int64_t rounds, int64_t threads) {
    constexpr int64_t COUNT = 2048;
    on_threads(threads, [=] {
        std::vector<float> phases(COUNT), sines(COUNT), cosines(COUNT);
        for (int64_t i = 0; i < COUNT; i++) {
            phases[i] = 0.01f * static_cast<float>(i);
        }
        for (int64_t round = 0; round < rounds; round++) {
            for (int64_t at = 0; at < COUNT; at += 4 * LANES) {
                V u[4], cosine[4];
                for (int i = 0; i < 4; i++) {
                    u[i] = load(phases.data() + at + i * LANES);
                    sine(u[i], cosine[i]);
                }
                for (int i = 0; i < 4; i++) {
                    store(sines.data() + at + i * LANES, u[i]);
                    store(cosines.data() + at + i * LANES, cosine[i]);
                }
            }
            phases[round % COUNT] = sines[round % COUNT];
        }
        sink = cosines[1];
    });
    return static_cast<double>(COUNT * rounds) * static_cast<double>(threads);
}

// Weights whose gradient was read, and whose two moments and value were read and written.
double nfscale_updates(int64_t rounds, int64_t threads) {
    constexpr int64_t COUNT = 8192;  // 128 KiB in all, a field's worth: in the second level of cache
    on_threads(threads, [=] {
        std::vector<float> weights(COUNT), first(COUNT), second(COUNT), gradient(COUNT, 1e-3f);
        const V kept = same(0.9f), size = same(-1e-3f);
        for (int64_t round = 0; round < rounds; round++) {
            for (int64_t at = 0; at < COUNT; at += LANES) {
                const V g = load(gradient.data() + at);
                const V m = fused(load(first.data() + at), kept, g);
                const V v = fused(load(second.data() + at), kept, g * g);
                store(first.data() + at, m);
                store(second.data() + at, v);
                store(weights.data() + at, fused(m * v, size, load(weights.data() + at)));
            }
        }
        sink = weights[1];
    });
    return static_cast<double>(COUNT * rounds) * static_cast<double>(threads);
}

}  // extern "C"
