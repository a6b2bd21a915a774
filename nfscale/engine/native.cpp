// Steps of sine MLPs on a CPU: gather, forward, backward and optimiser of one field after the other.
//
// Fields are independent, so a thread takes a field through all its steps before it takes the next one, and a
// field is the same bits alone, in any batch and on any number of threads. The points of a step pass through
// forward and backward in tiles that stay in cache. In a tile, points are rows and units are columns; all numbers
// come in groups of 16 lanes, whatever the machine's registers hold, and every sum has one order, so AVX2 and
// AVX-512 give the same bits too.
//
// h = sin(omega z), z = W h' + b, is computed as sin(pi u) with u = (omega / pi) W h' + (omega / pi) b: the factor
// goes into the packed weights, and taking off the nearest integer of u is exact. dh/dz = omega cos(pi u) comes
// from the same reduction.
//
// Danger: never compile this with -ffast-math. It links a constructor that flushes subnormals to zero for the
// whole thread that loads the library.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace {

constexpr int64_t LANES = 16;

// V is 16 floats. ROWS x COLUMNS of them are what a product keeps in registers.

#if defined(__AVX512F__) && defined(__AVX512DQ__)

constexpr int ROWS = 8, COLUMNS = 2;
struct V {
    __m512 all;
};
INLINE V load(const float* from) { return {_mm512_loadu_ps(from)}; }
INLINE void store(float* to, V a) { _mm512_storeu_ps(to, a.all); }
INLINE V same(float a) { return {_mm512_set1_ps(a)}; }
INLINE V operator+(V a, V b) { return {_mm512_add_ps(a.all, b.all)}; }
INLINE V operator-(V a, V b) { return {_mm512_sub_ps(a.all, b.all)}; }
INLINE V operator*(V a, V b) { return {_mm512_mul_ps(a.all, b.all)}; }
INLINE V operator/(V a, V b) { return {_mm512_div_ps(a.all, b.all)}; }
INLINE V fused(V a, V b, V c) { return {_mm512_fmadd_ps(a.all, b.all, c.all)}; }
INLINE V root(V a) { return {_mm512_sqrt_ps(a.all)}; }
INLINE V nearest(V a) { return {_mm512_roundscale_ps(a.all, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// The sign bit of lanes whose integer is odd, and its use.
INLINE V odd(V a) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtps_epi32(a.all), 31))}; }
INLINE V flipped(V a, V sign) { return {_mm512_xor_ps(a.all, sign.all)}; }
// The sums of the lanes that are four apart, the halves first.
INLINE __m128 folded(V a) {
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a.all), _mm512_extractf32x8_ps(a.all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

#elif defined(__AVX2__) && defined(__FMA__)

constexpr int ROWS = 4, COLUMNS = 1;
struct V {
    __m256 low, high;
};
INLINE V load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
INLINE void store(float* to, V a) {
    _mm256_storeu_ps(to, a.low);
    _mm256_storeu_ps(to + 8, a.high);
}
INLINE V same(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
INLINE V operator+(V a, V b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
INLINE V operator-(V a, V b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
INLINE V operator*(V a, V b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
INLINE V operator/(V a, V b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
INLINE V fused(V a, V b, V c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
INLINE V root(V a) { return {_mm256_sqrt_ps(a.low), _mm256_sqrt_ps(a.high)}; }
INLINE V nearest(V a) {
    constexpr int how = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(a.low, how), _mm256_round_ps(a.high, how)};
}
INLINE __m256 odd(__m256 a) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtps_epi32(a), 31)); }
INLINE V odd(V a) { return {odd(a.low), odd(a.high)}; }
INLINE V flipped(V a, V sign) { return {_mm256_xor_ps(a.low, sign.low), _mm256_xor_ps(a.high, sign.high)}; }
INLINE __m128 folded(V a) {
    __m256 half = _mm256_add_ps(a.low, a.high);
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

#else  // whatever the compiler makes of vectors of four

constexpr int ROWS = 4, COLUMNS = 1;
typedef float Four __attribute__((vector_size(16)));
typedef int32_t FourWords __attribute__((vector_size(16)));
struct V {
    Four part[4];
};
#define EACH(expression)                        \
    V result;                                   \
    for (int i = 0; i < 4; i++) {               \
        result.part[i] = (expression);          \
    }                                           \
    return result
INLINE V load(const float* from) {
    V result;
    std::memcpy(&result, from, sizeof(V));
    return result;
}
INLINE void store(float* to, V a) { std::memcpy(to, &a, sizeof(V)); }
INLINE V same(float a) { EACH((Four{a, a, a, a})); }
INLINE V operator+(V a, V b) { EACH(a.part[i] + b.part[i]); }
INLINE V operator-(V a, V b) { EACH(a.part[i] - b.part[i]); }
INLINE V operator*(V a, V b) { EACH(a.part[i] * b.part[i]); }
INLINE V operator/(V a, V b) { EACH(a.part[i] / b.part[i]); }
INLINE V fused(V a, V b, V c) { EACH(a.part[i] * b.part[i] + c.part[i]); }
INLINE Four root(Four a) { return Four{std::sqrt(a[0]), std::sqrt(a[1]), std::sqrt(a[2]), std::sqrt(a[3])}; }
INLINE V root(V a) { EACH(root(a.part[i])); }
INLINE Four nearest(Four a) {
    return Four{std::nearbyint(a[0]), std::nearbyint(a[1]), std::nearbyint(a[2]), std::nearbyint(a[3])};
}
INLINE V nearest(V a) { EACH(nearest(a.part[i])); }
INLINE V odd(V a) { EACH((Four)(__builtin_convertvector(a.part[i], FourWords) << 31)); }
INLINE V flipped(V a, V sign) { EACH((Four)((FourWords)a.part[i] ^ (FourWords)sign.part[i])); }
#undef EACH
#if defined(__SSE2__)
INLINE __m128 folded(V a) { return (__m128)((a.part[0] + a.part[2]) + (a.part[1] + a.part[3])); }
#endif

#endif

INLINE float sum(V a) {
    float lane[LANES];
    store(lane, a);
    for (int half = LANES / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; i++) {
            lane[i] += lane[i + half];
        }
    }
    return lane[0];
}

// The sums of four, each in the order of `sum`.
INLINE void sums_of_four(const V (&a)[4], float (&to)[4]) {
#if defined(__SSE2__)
    __m128 quarter[4];
    for (int i = 0; i < 4; i++) {
        quarter[i] = folded(a[i]);
    }
    _MM_TRANSPOSE4_PS(quarter[0], quarter[1], quarter[2], quarter[3]);
    _mm_storeu_ps(to, _mm_add_ps(_mm_add_ps(quarter[0], quarter[2]), _mm_add_ps(quarter[1], quarter[3])));
#else
    for (int i = 0; i < 4; i++) {
        to[i] = sum(a[i]);
    }
#endif
}

// sin(pi r) / r and cos(pi r) as polynomials in r^2 for |r| <= 1/2, minimax: with rounding, errors below 1.4e-7.
constexpr float SINE[5] = {3.1415925f, -5.1677017f, 2.5499473f, -0.597557f, 0.07629661f};
constexpr float COSINE[6] = {1.0f, -4.934802f, 4.058709f, -1.3352121f, 0.23493756f, -0.024396716f};

// The coefficients of scale * cos.
struct Cosine {
    float at[6];
    explicit Cosine(double scale) {
        for (int i = 0; i < 6; i++) {
            at[i] = static_cast<float>(scale * COSINE[i]);
        }
    }
};

// u -> sin(pi u), and scale * cos(pi u) where it is asked for; COUNT at once, so that their latencies overlap.
template <int COUNT, bool WITH_COSINE>
INLINE void sine(const Cosine& cosine, V (&u)[COUNT], V (&cosines)[COUNT]) {
    V sign[COUNT], square[COUNT], value[COUNT];
    for (int i = 0; i < COUNT; i++) {
        V whole = nearest(u[i]);
        sign[i] = odd(whole);
        u[i] = u[i] - whole;
        square[i] = u[i] * u[i];
        value[i] = fused(square[i], same(SINE[4]), same(SINE[3]));
        if (WITH_COSINE) {
            cosines[i] = fused(square[i], same(cosine.at[5]), same(cosine.at[4]));
        }
    }
    for (int power = 2; power >= 0; power--) {
        for (int i = 0; i < COUNT; i++) {
            value[i] = fused(square[i], value[i], same(SINE[power]));
        }
        if (WITH_COSINE) {
            for (int i = 0; i < COUNT; i++) {
                cosines[i] = fused(square[i], cosines[i], same(cosine.at[power + 1]));
            }
        }
    }
    for (int i = 0; i < COUNT; i++) {
        if (WITH_COSINE) {
            cosines[i] = flipped(fused(square[i], cosines[i], same(cosine.at[0])), sign[i]);
        }
        u[i] = flipped(value[i] * u[i], sign[i]);
    }
}

// Two matrices to multiply: A, with element (m, k) or of its transpose, and B, whose element (k, column j of 16 lanes)
// lies at k * b_row + j * b_column.
struct Factors {
    const float* a;
    int64_t a_row;
    const float* b;
    int64_t b_row, b_column;
};

// ROWS x COLUMNS of the sum of COUNT products A B, or A^T B where TRANSPOSED.
template <bool TRANSPOSED, int M, int N, int COUNT, class Start, class Done>
INLINE void block(int64_t m, int64_t j, int64_t depth, const Factors (&factors)[COUNT], const Start& start,
                  const Done& done) {
    V sums[M][N];
    for (int column = 0; column < N; column++) {
        V first = start(j + column);
        for (int row = 0; row < M; row++) {
            sums[row][column] = first;
        }
    }
    for (int pair = 0; pair < COUNT; pair++) {
        const int64_t a_row = factors[pair].a_row, b_row = factors[pair].b_row, b_column = factors[pair].b_column;
        const float* a = factors[pair].a + (TRANSPOSED ? m : m * a_row);
        const float* b = factors[pair].b + j * b_column;
        for (int64_t k = 0; k < depth; k++) {
            V right[N];
            for (int column = 0; column < N; column++) {
                right[column] = load(b + k * b_row + column * b_column);
            }
            for (int row = 0; row < M; row++) {
                V left = same(TRANSPOSED ? a[k * a_row + row] : a[row * a_row + k]);
                for (int column = 0; column < N; column++) {
                    sums[row][column] = fused(left, right[column], sums[row][column]);
                }
            }
        }
    }
    V finished[M][N];  // a copy, so that nothing takes the address of the sums, which would keep them in memory
    for (int row = 0; row < M; row++) {
        for (int column = 0; column < N; column++) {
            finished[row][column] = sums[row][column];
        }
    }
    done(m, j, finished);
}

template <bool TRANSPOSED, int N, int COUNT, class Start, class Done>
INLINE void columns(int64_t j, int64_t height, int64_t depth, const Factors (&factors)[COUNT], const Start& start,
                    const Done& done) {
    int64_t m = 0;
    for (; m + ROWS <= height; m += ROWS) {
        block<TRANSPOSED, ROWS, N>(m, j, depth, factors, start, done);
    }
    if (TRANSPOSED) {  // tiles have a multiple of ROWS points; the units of a layer are any number
        for (; m < height; m++) {
            block<TRANSPOSED, 1, N>(m, j, depth, factors, start, done);
        }
    }
}

template <bool TRANSPOSED, int COUNT, class Start, class Done>
INLINE void product(int64_t height, int64_t width, int64_t depth, const Factors (&factors)[COUNT], const Start& start,
                    const Done& done) {
    int64_t j = 0;
    for (; j + COLUMNS <= width; j += COLUMNS) {
        columns<TRANSPOSED, COLUMNS>(j, height, depth, factors, start, done);
    }
    for (; j < width; j++) {
        columns<TRANSPOSED, 1>(j, height, depth, factors, start, done);
    }
}

constexpr int64_t TILE_BYTES = 384 << 10;  // of activations: with the weights they stay in 1 MiB of second-level cache
constexpr int64_t MOST_POINTS = 128, FEWEST_POINTS = 32;

INLINE int64_t rounded_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

}  // namespace

extern "C" {

// Mirrored by ctypes structures: fields of eight bytes each.

struct Net {
    int64_t dimensions, channels, width, depth;
    double omega_0, omega_hidden;
};

// Samples of a batch: [fields, available, ...], and which of them a step takes.
struct Data {
    int64_t available, taken;      // points that there are of a field, and that a step takes
    const float* coordinates;      // [fields | 1, available, D]
    int64_t coordinates_stride;    // floats from one field to the next; 0 where all share them
    const float* values;           // [fields, available, C]
    const float* mask;             // [fields, available], or null
    int64_t sampling;              // 0: all points, in order; 1: stratified; 2: uniform
    int64_t stream;                // of the random numbers
    const int64_t *seeds, *steps;  // [fields]: of the data, and how many updates the fields have had
    const int64_t *run_start, *run_length, *units, *unit_count;  // of stratified sampling, [taken]; units [taken, n]
    int64_t most_units;
};

struct Update {
    int64_t kind;                  // see below
    float *first, *second;         // moments [fields, P]; the second of Adam and of a diagonal of the field's own
    const float* step_size;        // [fields, steps]
    const float* correction;       // [fields, steps]: of the second moment's root, or of the momentum
    const float* longest;          // [fields, steps]: bound on the root mean square of a step, or null
    const int64_t* diagonal_row;   // [fields, steps]
    const float* inverse_diagonal; // [rows, P]
    int64_t* probes;               // [fields]: taken so far, of a diagonal of the field's own
    const float* factors;          // [P]: of each param on the step size of Adam, or null
    int64_t update_every, probe_stream;
    double beta1, beta2, epsilon, damping;
};

}  // extern "C"

namespace {

constexpr int64_t ADAM = 0, SHARED_DIAGONAL = 1, OWN_DIAGONAL = 2;  // kinds of updates
constexpr double PI = 3.14159265358979323846;

// `own` here, and `other(0)` to `other(count - 1)` in a thread each, of which the machine may grant fewer.
template <class Other, class Own>
void with_threads(int64_t count, const Other& other, const Own& own) {
    std::vector<std::thread> others;
    try {
        for (int64_t i = 0; i < count; i++) {
            others.emplace_back([&other, i] { other(i); });
        }
    } catch (const std::system_error&) {
        // Those that run do all.
    }
    own();
    for (std::thread& thread : others) {
        thread.join();
    }
}

// Four words of 32 bits: Philox4x32-10, as nfscale.rng has it.
struct Words {
    uint32_t at[4];
};

Words philox(uint64_t key, Words counter) {
    uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < 10; round++) {
        if (round) {
            key0 += 0x9E3779B9u;
            key1 += 0xBB67AE85u;
        }
        const uint64_t product0 = uint64_t{counter.at[0]} * 0xD2511F53u;
        const uint64_t product1 = uint64_t{counter.at[2]} * 0xCD9E8D57u;
        counter = {{static_cast<uint32_t>(product1 >> 32) ^ counter.at[1] ^ key0, static_cast<uint32_t>(product1),
                    static_cast<uint32_t>(product0 >> 32) ^ counter.at[3] ^ key1, static_cast<uint32_t>(product0)}};
    }
    return counter;
}

// Which points of a field enter a step: nfscale.engine.sampling, number for number.
class Sampler {
  public:
    explicit Sampler(const Data& data) : data(data) {
        if (data.sampling) {
            positions.resize(data.taken);
        }
        if (data.sampling == 1) {
            passes.resize(data.taken);
        }
    }

    // Before the first step of a field.
    void begin(int64_t field_) {
        field = field_;
        std::fill(passes.begin(), passes.end(), Pass{-1, 0, 0});
    }

    // Positions of the points of a step, counted from those that the field has had; null for all, in order.
    const int64_t* at(int64_t index) {
        if (!data.sampling) {
            return nullptr;
        }
        const uint64_t seed = static_cast<uint64_t>(data.seeds[field]);
        const int64_t step = data.steps[field] + index;
        const uint32_t stream = static_cast<uint32_t>(data.stream);
        if (data.sampling == 2) {
            for (int64_t start = 0; start < data.taken; start += 4) {
                const Words words =
                    philox(seed, {{static_cast<uint32_t>(start / 4), static_cast<uint32_t>(step), stream, 0}});
                for (int64_t i = 0; i < std::min<int64_t>(4, data.taken - start); i++) {
                    positions[start + i] = static_cast<int64_t>(uint64_t{words.at[i]} * data.available >> 32);
                }
            }
            return positions.data();
        }
        for (int64_t run = 0; run < data.taken; run++) {
            const int64_t length = data.run_length[run], number = step / length, place = step % length;
            Pass& pass = passes[run];
            if (pass.number != number) {
                const Words words =
                    philox(seed, {{static_cast<uint32_t>(run), static_cast<uint32_t>(number), stream, 0}});
                const int64_t unit = static_cast<int64_t>(uint64_t{words.at[1]} * data.unit_count[run] >> 32);
                pass = {number, data.units[run * data.most_units + unit],
                        static_cast<int64_t>(uint64_t{words.at[0]} * length >> 32)};
            }
            positions[run] = data.run_start[run] + (pass.multiplier * place + pass.offset) % length;
        }
        return positions.data();
    }

  private:
    struct Pass {
        int64_t number, multiplier, offset;
    };
    const Data data;
    int64_t field = 0;
    std::vector<int64_t> positions;
    std::vector<Pass> passes;
};

// What a worker computes: values of fields, or gradients of their losses too, or also Hessian-vector products.
enum class Need { VALUES, GRADIENTS, PRODUCTS };

// The points of a field are summed up in parts that depend on their number alone, so that several threads can share
// one field and the sums stay the same bits. Parts are large: adding them up costs a gradient each.
constexpr int64_t TILES_OF_A_PART = 16, MOST_PARTS = 16;

// What a thread needs to take one field through its steps.
//
// A Hessian-vector product is the derivative of the gradient along a probe (Pearlmutter, "Fast exact multiplication by
// the Hessian", 1994): each quantity of forward and backward has a twin, its derivative along the probe.
class Worker {
  public:
    Worker(const Net& net, const Data& data, Need need)
        : net(net), data(data), need(need), sampler(data), across((net.width + LANES - 1) / LANES),
          stride(across * LANES + LANES), first(net.omega_0), hidden(net.omega_hidden) {
        const int64_t most_points = need == Need::VALUES ? data.available : data.taken;
        size = (net.dimensions + 1) * net.width + (net.depth - 1) * (net.width + 1) * net.width +
               (net.width + 1) * net.channels;
        padded = rounded_up(size, LANES);
        const int64_t buffers = need == Need::VALUES ? net.depth : (need == Need::GRADIENTS ? 2 : 4) * net.depth;
        int64_t most = TILE_BYTES / (buffers * stride * static_cast<int64_t>(sizeof(float)));
        most = std::clamp(most, FEWEST_POINTS, MOST_POINTS) / 8 * 8;
        tiles = std::max<int64_t>(1, (most_points + most - 1) / most);
        tile = rounded_up(std::max<int64_t>(1, (most_points + tiles - 1) / tiles), 8);
        tiles = (most_points + tile - 1) / tile;
        parts = need == Need::VALUES ? 1 : std::clamp<int64_t>(tiles / TILES_OF_A_PART, 1, MOST_PARTS);
        lay_out();
        memory = static_cast<float*>(std::aligned_alloc(64, laid_out * sizeof(float)));
        if (memory) {
            lay_out();
            std::memset(memory, 0, (laid_out - (part_sums ? parts * padded * sums_of_a_part() : 0)) * sizeof(float));
        }
    }
    Worker(const Worker&) = delete;
    Worker& operator=(const Worker&) = delete;
    ~Worker() { std::free(memory); }

    bool ready() const { return memory != nullptr; }
    int64_t params() const { return size; }

    // Share the points of each field with so many threads more, if it has enough of them.
    void take_helpers(int64_t count) {
        for (int64_t i = 0; i < std::min(count, parts - 1); i++) {
            helpers.push_back(std::make_unique<Worker>(net, data, need));
            if (!helpers.back()->ready()) {
                helpers.pop_back();
                return;
            }
            helpers.back()->packed = packed;
            helpers.back()->probe = probe;
        }
    }

    // All steps of one field, from and to its rows of weights and moments.
    void advance(int64_t field, int64_t step_count, const Update& update, float* rows) {
        std::memcpy(row, rows + field * size, size * sizeof(float));
        std::memcpy(moments[0], update.first + field * size, size * sizeof(float));
        if (update.second) {
            std::memcpy(moments[1], update.second + field * size, size * sizeof(float));
        }
        if (update.kind == OWN_DIAGONAL) {
            invert(update, field);
        }
        sampler.begin(field);
        for (int64_t step = 0; step < step_count; step++) {
            const int64_t at = field * step_count + step;
            pack(row, packed);
            const int64_t* positions = sampler.at(step);
            if (update.kind == OWN_DIAGONAL && step % update.update_every == 0) {
                const int64_t taken = data.steps[field] + step;
                draw_probe(static_cast<uint64_t>(data.seeds[field]), taken, update.probe_stream);
                differentiate<true>(field, positions);
                if (taken % update.update_every == 0) {
                    accumulate(update, field);
                }
            } else {
                differentiate<false>(field, positions);
            }
            if (update.kind == ADAM) {
                adam(update, at);
            } else if (update.kind == SHARED_DIAGONAL) {
                preconditioned(update, at, update.inverse_diagonal + update.diagonal_row[at] * size);
            } else {
                preconditioned(update, at, inverse);
            }
        }
        std::memcpy(rows + field * size, row, size * sizeof(float));
        std::memcpy(update.first + field * size, moments[0], size * sizeof(float));
        if (update.second) {
            std::memcpy(update.second + field * size, moments[1], size * sizeof(float));
        }
    }

    // Loss and gradient of one field at its row of weights.
    float differentiate(int64_t field, const float* from, float* gradient_to) {
        std::memcpy(row, from, size * sizeof(float));
        pack(row, packed);
        const double loss = differentiate<false>(field, nullptr);
        std::memcpy(gradient_to, gradient, size * sizeof(float));
        return static_cast<float>(loss);
    }

    // Loss, gradient and Hessian-vector product of one field at its row of weights.
    float differentiate_along(int64_t field, const float* from, const float* along, float* gradient_to,
                              float* product_to) {
        std::memcpy(row, from, size * sizeof(float));
        pack(row, packed);
        std::memcpy(hv, along, size * sizeof(float));
        pack(hv, probe);
        const double loss = differentiate<true>(field, nullptr);
        std::memcpy(gradient_to, gradient, size * sizeof(float));
        std::memcpy(product_to, hv, size * sizeof(float));
        return static_cast<float>(loss);
    }

    // Values of one field: [available, C].
    void apply(int64_t field, const float* from, float* to) {
        std::memcpy(row, from, size * sizeof(float));
        pack(row, packed);
        for (int64_t start = 0; start < data.available; start += tile) {
            int64_t count = std::min(tile, data.available - start);
            gather(field, nullptr, start, count, 0.0f);
            forward<false>(rounded_up(count, ROWS));
            evaluate(count);
            std::memcpy(to + start * net.channels, outputs, count * net.channels * sizeof(float));
        }
    }

  private:
    // Weights, or a probe, as the products read them.
    struct Packed {
        std::vector<float*> forward, bias, backward;
        float *last, *last_bias;
    };
    // A gradient, or a product, in groups of lanes.
    struct Sums {
        std::vector<float*> weight, bias;
        float *last, *last_bias;
    };
    // Of the points of a tile.
    struct Layer {
        float *output, *slope;  // the slope of the sine, then the gradient with respect to what goes into it
        float *output_along, *slope_along;  // their derivatives along the probe
    };

    const Net net;
    const Data data;
    const Need need;
    Sampler sampler;
    const int64_t across, stride;  // groups of 16 lanes in a layer; floats from one point to the next
    const Cosine first, hidden;
    int64_t size = 0, padded = 0, tile = 0, tiles = 0, parts = 0, laid_out = 0;
    float* memory = nullptr;
    Packed packed, probe;
    Sums gradient_sums, product_sums;
    std::vector<Layer> layers;
    float *points, *values, *weights, *outputs, *outputs_along, *scratch;
    float *row, *gradient, *hv, *moments[2], *inverse, *part_sums;
    std::vector<std::unique_ptr<Worker>> helpers;

    int64_t inputs(int64_t layer) const { return layer ? net.width : net.dimensions; }
    double omega(int64_t layer) const { return layer ? net.omega_hidden : net.omega_0; }
    int64_t sums_of_a_part() const { return need == Need::PRODUCTS ? 2 : 1; }

    // Where a layer's weights [out, in] and its bias [out] lie in a row.
    int64_t offset(int64_t layer) const {
        return layer ? (net.dimensions + 1) * net.width + (layer - 1) * (net.width + 1) * net.width : 0;
    }

    // Give every buffer its place in the memory; before there is any, count the floats.
    void lay_out() {
        const bool backward = need != Need::VALUES, along = need == Need::PRODUCTS;
        const int64_t lanes = across * LANES;
        laid_out = 0;
        auto place = [&](bool wanted, int64_t floats) -> float* {
            if (!wanted) {
                return nullptr;
            }
            float* at = memory ? memory + laid_out : nullptr;
            laid_out += rounded_up(floats, LANES);
            return at;
        };
        auto place_packed = [&](bool wanted) {
            Packed to;
            for (int64_t layer = 0; layer < net.depth; layer++) {
                to.forward.push_back(place(wanted, inputs(layer) * lanes));
                to.bias.push_back(place(wanted, lanes));
                to.backward.push_back(place(wanted && layer && backward, net.width * lanes));
            }
            to.last = place(wanted, net.channels * lanes);
            to.last_bias = place(wanted, net.channels);
            return to;
        };
        auto place_sums = [&](bool wanted) {
            Sums to;
            for (int64_t layer = 0; layer < net.depth; layer++) {
                to.weight.push_back(place(wanted, std::max(inputs(layer), net.width) * lanes));
                to.bias.push_back(place(wanted, lanes));
            }
            to.last = place(wanted, net.channels * lanes);
            to.last_bias = place(wanted, net.channels);
            return to;
        };
        packed = place_packed(true);
        probe = place_packed(along);
        gradient_sums = place_sums(backward);
        product_sums = place_sums(along);
        layers.clear();
        for (int64_t layer = 0; layer < net.depth; layer++) {
            float *output = place(true, tile * stride), *slope = place(backward, tile * stride);
            float *output_along = place(along, tile * stride), *slope_along = place(along, tile * stride);
            layers.push_back({output, slope, output_along, slope_along});
        }
        points = place(true, tile * net.dimensions);
        values = place(true, tile * net.channels);
        weights = place(true, tile);
        outputs = place(true, tile * net.channels);
        outputs_along = place(along, tile * net.channels);
        scratch = place(along, tile * stride);
        row = place(true, padded);
        gradient = place(backward, padded);
        hv = place(along, padded);
        moments[0] = place(backward, padded);
        moments[1] = place(backward, padded);
        inverse = place(along, padded);
        part_sums = place(parts > 1, parts * padded * sums_of_a_part());  // the last, see the constructor
    }

    static void transpose(const float* from, int64_t from_row, float* to, int64_t to_row, int64_t rows_,
                          int64_t columns_, float scale) {
#if defined(__SSE2__)
        if (rows_ == 4 && columns_ == 4) {
            __m128 factor = _mm_set1_ps(scale);
            __m128 a = _mm_mul_ps(_mm_loadu_ps(from), factor);
            __m128 b = _mm_mul_ps(_mm_loadu_ps(from + from_row), factor);
            __m128 c = _mm_mul_ps(_mm_loadu_ps(from + 2 * from_row), factor);
            __m128 d = _mm_mul_ps(_mm_loadu_ps(from + 3 * from_row), factor);
            _MM_TRANSPOSE4_PS(a, b, c, d);
            _mm_storeu_ps(to, a);
            _mm_storeu_ps(to + to_row, b);
            _mm_storeu_ps(to + 2 * to_row, c);
            _mm_storeu_ps(to + 3 * to_row, d);
            return;
        }
#endif
        for (int64_t i = 0; i < rows_; i++) {
            for (int64_t j = 0; j < columns_; j++) {
                to[j * to_row + i] = scale * from[i * from_row + j];
            }
        }
    }

    // Lay a row out as the products read it. Lanes beyond the width stay zero.
    void pack(const float* from_row, const Packed& to) const {
        const int64_t width = net.width;
        for (int64_t index = 0; index < net.depth; index++) {
            const float* from = from_row + offset(index);
            const int64_t in = inputs(index);
            const float scale = static_cast<float>(omega(index) / PI);
            for (int64_t o = 0; o < width; o += 4) {  // forward: [group of o][i][16 lanes of o]
                float* lanes = to.forward[index] + o / LANES * in * LANES + o % LANES;
                int64_t height = std::min<int64_t>(4, width - o);
                for (int64_t i = 0; i < in; i += 4) {
                    const int64_t columns_ = std::min<int64_t>(4, in - i);
                    transpose(from + o * in + i, in, lanes + i * LANES, LANES, height, columns_, scale);
                }
            }
            const float* bias = from + width * in;
            for (int64_t o = 0; o < width; o++) {
                to.bias[index][o] = scale * bias[o];
            }
            if (to.backward[index]) {  // backward: [group of i][o][16 lanes of i]
                spread(from, width, to.backward[index]);
            }
        }
        const float* from = from_row + offset(net.depth);
        spread(from, net.channels, to.last);
        std::memcpy(to.last_bias, from + net.channels * width, net.channels * sizeof(float));
    }

    // [height, width] -> [group of columns][height][16 lanes].
    void spread(const float* from, int64_t height, float* to) const {
        const int64_t width = net.width;
        for (int64_t group = 0; group < across; group++) {
            const int64_t filled = std::min(LANES, width - group * LANES);
            for (int64_t o = 0; o < height; o++) {
                float* lanes = to + (group * height + o) * LANES;
                const float* source = from + o * width + group * LANES;
                if (filled == LANES) {
                    store(lanes, load(source));
                } else {
                    std::memcpy(lanes, source, filled * sizeof(float));
                }
            }
        }
    }

    // Points [start, start + count) of a step into the tile; what fills it up counts nothing.
    void gather(int64_t field, const int64_t* positions, int64_t start, int64_t count, float share) {
        const float* coordinates_ = data.coordinates + field * data.coordinates_stride;
        const float* values_ = data.values ? data.values + field * data.available * net.channels : nullptr;
        const float* mask = data.mask ? data.mask + field * data.available : nullptr;
        for (int64_t point = 0; point < count; point++) {
            const int64_t from = positions ? positions[start + point] : start + point;
            for (int64_t d = 0; d < net.dimensions; d++) {
                points[point * net.dimensions + d] = coordinates_[from * net.dimensions + d];
            }
            if (values_) {
                for (int64_t c = 0; c < net.channels; c++) {
                    values[point * net.channels + c] = values_[from * net.channels + c];
                }
                weights[point] = mask ? mask[from] * share : share;
            }
        }
        const int64_t filled = rounded_up(count, ROWS);
        std::fill(points + count * net.dimensions, points + filled * net.dimensions, 0.0f);
    }

    // --- forward

    static V zero(int64_t) { return same(0.0f); }

    template <bool WITH_COSINE>  // inline in any case: in `apply`, compilers otherwise make code of it a tenth slower
    INLINE void forward(int64_t count) {
        for (int64_t index = 0; index < net.depth; index++) {
            const Layer& layer = layers[index];
            const float* before = index ? layers[index - 1].output : points;
            const int64_t in = inputs(index);
            const Cosine& cosine = index ? hidden : first;
            const int64_t before_row = index ? stride : net.dimensions;
            const Factors factors[] = {{before, before_row, packed.forward[index], LANES, in * LANES}};
            auto start = [&](int64_t j) { return load(packed.bias[index] + j * LANES); };
            auto done = [&](int64_t m, int64_t j, auto& sums) { activate<WITH_COSINE>(layer, cosine, m, j, sums); };
            product<false>(count, across, in, factors, start, done);
        }
    }

    template <bool WITH_COSINE, int M, int N>
    INLINE void activate(const Layer& layer, const Cosine& cosine, int64_t m, int64_t j, V (&sums)[M][N]) const {
        for (int row_ = 0; row_ < M; row_ += 4 / N) {
            V u[4], cosines[4];
            for (int i = 0; i < 4; i++) {
                u[i] = sums[row_ + i / N][i % N];
            }
            sine<4, WITH_COSINE>(cosine, u, cosines);
            for (int i = 0; i < 4; i++) {
                const int64_t at = (m + row_ + i / N) * stride + (j + i % N) * LANES;
                store(layer.output + at, u[i]);
                if (WITH_COSINE) {
                    store(layer.slope + at, cosines[i]);
                }
            }
        }
    }

    // What `forward` computed, as derivatives along the probe. With u' = (omega / pi) (W h' + b) along the probe, they
    // are omega cos(pi u) (pi / omega) u' for an output and -omega^2 sin(pi u) (pi / omega) u' for a slope.
    void forward_along(int64_t count) {
        for (int64_t index = 0; index < net.depth; index++) {
            const Layer& layer = layers[index];
            const int64_t in = inputs(index);
            const V rise = same(static_cast<float>(PI / omega(index)));
            const V fall = same(static_cast<float>(-PI * omega(index)));
            auto start = [&](int64_t j) { return load(probe.bias[index] + j * LANES); };
            auto finish = [&](int64_t at, V u) {
                store(layer.output_along + at, load(layer.slope + at) * (rise * u));
                store(layer.slope_along + at, load(layer.output + at) * (fall * u));
            };
            auto done = [&](int64_t m, int64_t j, auto& sums) { each(m, j, sums, finish); };
            if (!index) {  // nothing comes in that depends on the weights
                const Factors factors[] = {{points, net.dimensions, probe.forward[0], LANES, in * LANES}};
                product<false>(count, across, in, factors, start, done);
                continue;
            }
            const Layer& below = layers[index - 1];
            const Factors factors[] = {{below.output, stride, probe.forward[index], LANES, in * LANES},
                                       {below.output_along, stride, packed.forward[index], LANES, in * LANES}};
            product<false>(count, across, in, factors, start, done);
        }
    }

    // Call `of` with the place of each of the sums in a tile.
    template <int M, int N, class Of>
    INLINE void each(int64_t m, int64_t j, V (&sums)[M][N], const Of& of) const {
        for (int row_ = 0; row_ < M; row_++) {
            for (int column = 0; column < N; column++) {
                of((m + row_) * stride + (j + column) * LANES, sums[row_][column]);
            }
        }
    }

    // The linear layer: values of the tile's points, four at a time. Those of what fills it up count nothing.
    void evaluate(int64_t count) {
        const float* before = layers.back().output;
        for (int64_t point = 0; point < count; point += 4) {
            for (int64_t c = 0; c < net.channels; c++) {
                float values_[4];
                dots(before + point * stride, packed.last, c, values_);
                for (int i = 0; i < 4; i++) {
                    outputs[(point + i) * net.channels + c] = values_[i] + packed.last_bias[c];
                }
            }
        }
    }

    void evaluate_along(int64_t count) {
        const Layer& top = layers.back();
        for (int64_t point = 0; point < count; point += 4) {
            for (int64_t c = 0; c < net.channels; c++) {
                float along[4], values_[4];
                dots(top.output_along + point * stride, packed.last, c, along);
                dots(top.output + point * stride, probe.last, c, values_);
                for (int i = 0; i < 4; i++) {
                    outputs_along[(point + i) * net.channels + c] = values_[i] + along[i] + probe.last_bias[c];
                }
            }
        }
    }

    // Products of the units of four points with the weights of a channel.
    INLINE void dots(const float* units, const float* last, int64_t channel, float (&to)[4]) const {
        V totals[4] = {same(0.0f), same(0.0f), same(0.0f), same(0.0f)};
        for (int64_t group = 0; group < across; group++) {
            const V weight = load(last + (group * net.channels + channel) * LANES);
            for (int i = 0; i < 4; i++) {
                totals[i] = fused(load(units + i * stride + group * LANES), weight, totals[i]);
            }
        }
        sums_of_four(totals, to);
    }

    // --- backward

    double total_weight(int64_t field, const int64_t* positions) const {
        if (!data.mask) {
            return static_cast<double>(data.taken);
        }
        const float* mask = data.mask + field * data.available;
        double total = 0.0;
        for (int64_t point = 0; point < data.taken; point++) {
            total += mask[positions ? positions[point] : point];
        }
        return total;
    }

    // The loss of a step and its gradient, in the order of the row; with ALONG its product with the probe too.
    template <bool ALONG>
    double differentiate(int64_t field, const int64_t* positions) {
        const float share = static_cast<float>(1.0 / total_weight(field, positions));
        if (parts == 1) {
            const double loss = sum_part<ALONG>(field, positions, share, 0);
            collect(gradient_sums, gradient);
            if (ALONG) {
                collect(product_sums, hv);
            }
            return loss;
        }
        std::vector<double> losses(parts);
        std::atomic<int64_t> next{0};
        auto serve = [&](Worker& worker) {
            for (int64_t part; (part = next.fetch_add(1)) < parts;) {
                losses[part] = worker.sum_part<ALONG>(field, positions, share, part);
                worker.collect(worker.gradient_sums, part_sums + part * padded);
                if (ALONG) {
                    worker.collect(worker.product_sums, part_sums + (parts + part) * padded);
                }
            }
        };
        with_threads(static_cast<int64_t>(helpers.size()), [&](int64_t helper) { serve(*helpers[helper]); },
                     [&] { serve(*this); });
        add_up(part_sums, gradient);
        if (ALONG) {
            add_up(part_sums + parts * padded, hv);
        }
        double loss = 0.0;
        for (double of_part : losses) {
            loss += of_part;
        }
        return loss;
    }

    void add_up(const float* from, float* to) const {
        std::memcpy(to, from, size * sizeof(float));
        for (int64_t part = 1; part < parts; part++) {
            for (int64_t p = 0; p < size; p++) {
                to[p] += from[part * padded + p];
            }
        }
    }

    // Of the points of one part: its share of the loss, and of the sums.
    template <bool ALONG>
    double sum_part(int64_t field, const int64_t* positions, float share, int64_t part) {
        double loss = 0.0;
        const int64_t begin = part * tiles / parts * tile;
        const int64_t end = std::min(data.taken, (part + 1) * tiles / parts * tile);
        for (int64_t start = begin; start < end; start += tile) {
            int64_t count = std::min(tile, end - start);
            int64_t filled = rounded_up(count, ROWS);
            gather(field, positions, start, count, share);
            forward<true>(filled);
            evaluate(count);
            if (ALONG) {
                forward_along(filled);
                evaluate_along(count);
            }
            loss += residuals<ALONG>(count, filled);
            backward<ALONG>(filled, start == begin);
        }
        return loss;
    }

    // Outputs become the gradients of the loss with respect to them; of what fills up the tile they are zero.
    template <bool ALONG>
    double residuals(int64_t count, int64_t filled) {
        double loss = 0.0;
        const float per_channel = 2.0f / static_cast<float>(net.channels);
        for (int64_t point = 0; point < count; point++) {
            double squares = 0.0;
            for (int64_t c = 0; c < net.channels; c++) {
                const int64_t at = point * net.channels + c;
                const float residual = outputs[at] - values[at];
                squares += static_cast<double>(residual) * residual;
                outputs[at] = residual * per_channel * weights[point];
                if (ALONG) {
                    outputs_along[at] *= per_channel * weights[point];
                }
            }
            loss += squares / static_cast<double>(net.channels) * weights[point];
        }
        std::fill(outputs + count * net.channels, outputs + filled * net.channels, 0.0f);
        if (ALONG) {
            std::fill(outputs_along + count * net.channels, outputs_along + filled * net.channels, 0.0f);
        }
        return loss;
    }

    template <bool ALONG>
    void backward(int64_t count, bool begins) {
        const int64_t lanes = across * LANES, channels = net.channels, width = net.width;
        // The sums of a matrix: left^T right over the points of the tile, and along the probe the two parts of that.
        const auto sum_up = [&](const float* left, const float* left_along, int64_t left_row, int64_t height,
                                const float* right, const float* right_along, float* to, float* to_along) {
            const auto done = [=](float* to_) {
                return [=](int64_t m, int64_t j, auto& sums) { add_to(to_, lanes, begins, m, j, sums); };
            };
            const Factors factors[] = {{left, left_row, right, stride, LANES}};
            product<true>(height, across, count, factors, zero, done(to));
            if (ALONG && !left_along) {  // coordinates do not depend on the weights
                const Factors along[] = {{left, left_row, right_along, stride, LANES}};
                product<true>(height, across, count, along, zero, done(to_along));
            } else if (ALONG) {
                const Factors along[] = {{left_along, left_row, right, stride, LANES},
                                         {left, left_row, right_along, stride, LANES}};
                product<true>(height, across, count, along, zero, done(to_along));
            }
        };
        const Layer& top = layers.back();
        sum_up(outputs, outputs_along, channels, channels, top.output, top.output_along, gradient_sums.last,
               product_sums.last);
        sum_outputs(outputs, count, begins, gradient_sums.last_bias);
        if (ALONG) {
            sum_outputs(outputs_along, count, begins, product_sums.last_bias);
        }
        descend<ALONG>(top, count, channels, channels, outputs, outputs_along, packed.last, probe.last);
        for (int64_t index = net.depth - 1; index >= 0; index--) {
            const Layer& layer = layers[index];
            float *to = gradient_sums.weight[index], *to_along = product_sums.weight[index];
            sum_rows(layer.slope, count, begins, gradient_sums.bias[index]);
            if (ALONG) {
                sum_rows(layer.slope_along, count, begins, product_sums.bias[index]);
            }
            if (!index) {  // [D, out]
                sum_up(points, nullptr, net.dimensions, net.dimensions, layer.slope, layer.slope_along, to, to_along);
                break;
            }
            const Layer& below = layers[index - 1];  // [out, in]
            sum_up(layer.slope, layer.slope_along, stride, width, below.output, below.output_along, to, to_along);
            descend<ALONG>(below, count, width, stride, layer.slope, layer.slope_along, packed.backward[index],
                           probe.backward[index]);
        }
    }

    // From gradients with respect to what `height` units above take in, to those with respect to what goes into the
    // sines of a layer, in place of its slopes.
    template <bool ALONG>
    void descend(const Layer& layer, int64_t count, int64_t height, int64_t above_row, const float* above,
                 const float* above_along, const float* weights_, const float* probe_) const {
        const Factors factors[] = {{above, above_row, weights_, LANES, height * LANES}};
        if (!ALONG) {
            product<false>(count, across, height, factors, zero, [&](int64_t m, int64_t j, auto& sums) {
                each(m, j, sums, [&](int64_t at, V back) { store(layer.slope + at, load(layer.slope + at) * back); });
            });
            return;
        }
        const Factors along[] = {{above_along, above_row, weights_, LANES, height * LANES},
                                 {above, above_row, probe_, LANES, height * LANES}};
        product<false>(count, across, height, along, zero, [&](int64_t m, int64_t j, auto& sums) {
            each(m, j, sums, [&](int64_t at, V back) { store(scratch + at, back); });
        });
        product<false>(count, across, height, factors, zero, [&](int64_t m, int64_t j, auto& sums) {
            each(m, j, sums, [&](int64_t at, V back) {
                const V slope = load(layer.slope + at), slope_along = load(layer.slope_along + at);
                store(layer.slope + at, slope * back);
                store(layer.slope_along + at, slope * load(scratch + at) + slope_along * back);
            });
        });
    }

    template <int M, int N>
    INLINE static void add_to(float* to, int64_t to_row, bool begins, int64_t m, int64_t j, V (&sums)[M][N]) {
        for (int row_ = 0; row_ < M; row_++) {
            for (int column = 0; column < N; column++) {
                float* at = to + (m + row_) * to_row + (j + column) * LANES;
                store(at, begins ? sums[row_][column] : load(at) + sums[row_][column]);
            }
        }
    }

    void sum_outputs(const float* from, int64_t count, bool begins, float* to) const {
        for (int64_t c = 0; c < net.channels; c++) {
            double total = begins ? 0.0 : to[c];
            for (int64_t point = 0; point < count; point++) {
                total += from[point * net.channels + c];
            }
            to[c] = static_cast<float>(total);
        }
    }

    void sum_rows(const float* from, int64_t count, bool begins, float* to) const {
        for (int64_t group = 0; group < across; group++) {
            V total[4] = {same(0.0f), same(0.0f), same(0.0f), same(0.0f)};
            for (int64_t point = 0; point < count; point += 4) {
                for (int i = 0; i < 4; i++) {
                    total[i] = total[i] + load(from + (point + i) * stride + group * LANES);
                }
            }
            V all = (total[0] + total[1]) + (total[2] + total[3]);
            store(to + group * LANES, begins ? all : load(to + group * LANES) + all);
        }
    }

    // Sums from the groups of lanes into the order of the row.
    void collect(const Sums& from, float* to_row) const {
        const int64_t width = net.width, lanes = across * LANES;
        for (int64_t index = 0; index < net.depth; index++) {
            float* to = to_row + offset(index);
            if (index) {
                for (int64_t o = 0; o < width; o++) {
                    std::memcpy(to + o * width, from.weight[index] + o * lanes, width * sizeof(float));
                }
            } else {
                for (int64_t o = 0; o < width; o++) {
                    for (int64_t d = 0; d < net.dimensions; d++) {
                        to[o * net.dimensions + d] = from.weight[0][d * lanes + o];
                    }
                }
            }
            std::memcpy(to + width * inputs(index), from.bias[index], width * sizeof(float));
        }
        float* to = to_row + offset(net.depth);
        for (int64_t c = 0; c < net.channels; c++) {
            std::memcpy(to + c * width, from.last + c * lanes, width * sizeof(float));
        }
        std::memcpy(to + net.channels * width, from.last_bias, net.channels * sizeof(float));
    }

    // --- updates

    void adam(const Update& update, int64_t at) {
        const V beta1 = same(static_cast<float>(update.beta1)), rest1 = same(static_cast<float>(1 - update.beta1));
        const V beta2 = same(static_cast<float>(update.beta2)), rest2 = same(static_cast<float>(1 - update.beta2));
        const V epsilon = same(static_cast<float>(update.epsilon)), correction = same(1 / update.correction[at]);
        const V step_size = same(update.step_size[at]);
        const int64_t whole = size / LANES * LANES;
        float tail[LANES] = {};
        if (update.factors) {
            std::memcpy(tail, update.factors + whole, (size - whole) * sizeof(float));
        }
        for (int64_t p = 0; p < size; p += LANES) {  // buffers end at a multiple of the lanes, in zeros
            V g = load(gradient + p);
            V mean = load(moments[0] + p) * beta1 + g * rest1;
            V square = load(moments[1] + p) * beta2 + g * g * rest2;
            store(moments[0] + p, mean);
            store(moments[1] + p, square);
            V change = mean / (root(square) * correction + epsilon) * step_size;
            if (update.factors) {
                change = change * load(p < whole ? update.factors + p : tail);
            }
            store(row + p, load(row + p) - change);
        }
    }

    void preconditioned(const Update& update, int64_t at, const float* inverse_) {
        const V beta1 = same(static_cast<float>(update.beta1)), rest1 = same(static_cast<float>(1 - update.beta1));
        V squares = same(0.0f);
        const int64_t whole = size / LANES * LANES;
        float tail[LANES] = {};
        std::memcpy(tail, inverse_ + whole, (size - whole) * sizeof(float));
        for (int64_t p = 0; p < size; p += LANES) {
            V momentum = load(moments[0] + p) * beta1 + load(gradient + p) * rest1;
            V direction = momentum * load(p < whole ? inverse_ + p : tail);
            store(moments[0] + p, momentum);
            store(gradient + p, direction);
            squares = squares + direction * direction;
        }
        float step_size = update.step_size[at];
        const float correction = update.correction[at];
        if (update.longest) {
            const float rms = std::sqrt(sum(squares) / static_cast<float>(size)) / correction;
            const float most = update.longest[at] / rms;
            step_size *= most < 1.0f ? most : 1.0f;
        }
        const V factor = same(step_size / correction);
        for (int64_t p = 0; p < size; p += LANES) {
            store(row + p, load(row + p) - load(gradient + p) * factor);
        }
    }

    // -1 or 1 for each param: nfscale.rng.rademacher, number for number. A word yields 32 of them.
    void draw_probe(uint64_t seed, int64_t step, int64_t stream) {
        for (int64_t start = 0; start < size; start += 128) {
            const Words words = philox(seed, {{static_cast<uint32_t>(start / 128), static_cast<uint32_t>(step),
                                               static_cast<uint32_t>(stream), 0}});
            for (int64_t word = 0; word < 4; word++) {
                const int64_t at = start + 32 * word;
                for (int64_t i = 0; i < std::min<int64_t>(32, size - at); i++) {
                    hv[at + i] = static_cast<float>(2 * static_cast<int32_t>(words.at[word] >> i & 1) - 1);
                }
            }
        }
        pack(hv, probe);
    }

    // One more probe into the running mean of (Hv)^2.
    void accumulate(const Update& update, int64_t field) {
        const V rest = same(static_cast<float>(1 - update.beta2));
        for (int64_t p = 0; p < size; p += LANES) {
            const V product_ = load(hv + p), square = load(moments[1] + p);
            store(moments[1] + p, square + (product_ * product_ - square) * rest);
        }
        update.probes[field]++;
        invert(update, field);
    }

    // 1 / (D + damping) of the field's own diagonal.
    void invert(const Update& update, int64_t field) {
        const double weight = 1 - std::pow(update.beta2, static_cast<double>(update.probes[field]));
        const V factor = same(static_cast<float>(1 / weight));
        V total = same(0.0f);
        for (int64_t p = 0; p < size; p += LANES) {
            const V diagonal = root(load(moments[1] + p) * factor);
            store(inverse + p, diagonal);
            total = total + diagonal;
        }
        const V floor = same(static_cast<float>(update.damping) * (sum(total) / static_cast<float>(size)));
        for (int64_t p = 0; p < size; p += LANES) {
            store(inverse + p, same(1.0f) / (load(inverse + p) + floor));
        }
    }
};

// Give each of the jobs to one of the threads, this one among them; where there are fewer jobs than threads, those
// that are left help with the points of the others. False where memory ran out.
template <class Work>
bool share_out(const Net& net, const Data& data, Need need, int64_t jobs, int64_t threads, const Work& work) {
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    const int64_t teams = std::max<int64_t>(1, std::min(threads, jobs));
    auto serve = [&](int64_t team) {
        Worker worker(net, data, need);
        if (!worker.ready()) {
            failed = true;
            return;
        }
        worker.take_helpers(threads / teams + (team < threads % teams) - 1);
        for (int64_t job; (job = next.fetch_add(1)) < jobs;) {
            work(worker, job);
        }
    };
    with_threads(teams - 1, [&](int64_t other) { serve(other + 1); }, [&] { serve(0); });
    return !failed;
}

}  // namespace

extern "C" {

// Each returns 0, or 1 where memory ran out. `fields` are the indices of `jobs` fields of the batch.

int nfscale_advance(const Net* net, const Data* data, const Update* update, const int64_t* fields, int64_t jobs,
                    int64_t step_count, float* rows, int64_t threads) {
    const Need need = update->kind == OWN_DIAGONAL ? Need::PRODUCTS : Need::GRADIENTS;
    return !share_out(*net, *data, need, jobs, threads, [=](Worker& worker, int64_t job) {
        worker.advance(fields[job], step_count, *update, rows);
    });
}

int nfscale_gradient(const Net* net, const Data* data, int64_t jobs, const float* rows, float* losses,
                     float* gradients, int64_t threads) {
    return !share_out(*net, *data, Need::GRADIENTS, jobs, threads, [=](Worker& worker, int64_t job) {
        const int64_t at = job * worker.params();
        losses[job] = worker.differentiate(job, rows + at, gradients + at);
    });
}

int nfscale_product(const Net* net, const Data* data, int64_t jobs, const float* rows, const float* probes,
                    float* losses, float* gradients, float* products, int64_t threads) {
    return !share_out(*net, *data, Need::PRODUCTS, jobs, threads, [=](Worker& worker, int64_t job) {
        const int64_t at = job * worker.params();
        losses[job] = worker.differentiate_along(job, rows + at, probes + at, gradients + at, products + at);
    });
}

int nfscale_apply(const Net* net, const Data* data, int64_t jobs, const float* rows, float* values, int64_t threads) {
    return !share_out(*net, *data, Need::VALUES, jobs, threads, [=](Worker& worker, int64_t job) {
        worker.apply(job, rows + job * worker.params(), values + job * data->available * net->channels);
    });
}

// Positions of the points of `step_count` steps: [fields, step_count, taken].
void nfscale_positions(const Data* data, int64_t fields, int64_t step_count, int64_t* to) {
    Sampler sampler(*data);
    for (int64_t field = 0; field < fields; field++) {
        sampler.begin(field);
        for (int64_t step = 0; step < step_count; step++) {
            const int64_t* positions = sampler.at(step);
            to = std::copy(positions, positions + data->taken, to);
        }
    }
}

// sin(pi u) and cos(pi u) of count numbers, for tests.
void nfscale_sine(const float* u, float* sines, float* cosines, int64_t count) {
    const Cosine unscaled(1.0);
    for (int64_t start = 0; start < count; start += LANES) {
        float lanes[LANES] = {};
        const int64_t filled = std::min(LANES, count - start);
        std::memcpy(lanes, u + start, filled * sizeof(float));
        V at[1] = {load(lanes)}, cosine[1];
        sine<1, true>(unscaled, at, cosine);
        store(lanes, at[0]);
        std::memcpy(sines + start, lanes, filled * sizeof(float));
        store(lanes, cosine[0]);
        std::memcpy(cosines + start, lanes, filled * sizeof(float));
    }
}

}  // extern "C"
