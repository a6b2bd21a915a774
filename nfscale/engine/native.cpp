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

// ROWS x COLUMNS of the product of A (element m, k; of its transpose where TRANSPOSED) and B, whose element
// (k, column j of 16 lanes) lies at k * b_row + j * b_column.
template <bool TRANSPOSED, int M, int N, class Start, class Done>
INLINE void block(int64_t m, int64_t j, int64_t depth, const float* a, int64_t a_row, const float* b, int64_t b_row,
                  int64_t b_column, const Start& start, const Done& done) {
    V sums[M][N];
    for (int column = 0; column < N; column++) {
        V first = start(j + column);
        for (int row = 0; row < M; row++) {
            sums[row][column] = first;
        }
    }
    a += TRANSPOSED ? m : m * a_row;
    b += j * b_column;
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
    V finished[M][N];  // a copy, so that nothing takes the address of the sums, which would keep them in memory
    for (int row = 0; row < M; row++) {
        for (int column = 0; column < N; column++) {
            finished[row][column] = sums[row][column];
        }
    }
    done(m, j, finished);
}

template <bool TRANSPOSED, int N, class Start, class Done>
INLINE void columns(int64_t j, int64_t height, int64_t depth, const float* a, int64_t a_row, const float* b,
                    int64_t b_row, int64_t b_column, const Start& start, const Done& done) {
    int64_t m = 0;
    for (; m + ROWS <= height; m += ROWS) {
        block<TRANSPOSED, ROWS, N>(m, j, depth, a, a_row, b, b_row, b_column, start, done);
    }
    if (TRANSPOSED) {  // tiles have a multiple of ROWS points; the units of a layer are any number
        for (; m < height; m++) {
            block<TRANSPOSED, 1, N>(m, j, depth, a, a_row, b, b_row, b_column, start, done);
        }
    }
}

template <bool TRANSPOSED, class Start, class Done>
INLINE void product(int64_t height, int64_t width, int64_t depth, const float* a, int64_t a_row, const float* b,
                    int64_t b_row, int64_t b_column, const Start& start, const Done& done) {
    int64_t j = 0;
    for (; j + COLUMNS <= width; j += COLUMNS) {
        columns<TRANSPOSED, COLUMNS>(j, height, depth, a, a_row, b, b_row, b_column, start, done);
    }
    for (; j < width; j++) {
        columns<TRANSPOSED, 1>(j, height, depth, a, a_row, b, b_row, b_column, start, done);
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
    int64_t kind;                  // 0: Adam; 1: momentum over a shared diagonal
    float *first, *second;         // moments [fields, P]; the second is Adam's alone
    const float* step_size;        // [fields, steps]
    const float* correction;       // [fields, steps]: of the second moment's root, or of the momentum
    const float* longest;          // [fields, steps]: bound on the root mean square of a step, or null
    const int64_t* diagonal_row;   // [fields, steps]
    const float* inverse_diagonal; // [rows, P]
    double beta1, beta2, epsilon;
};

}  // extern "C"

namespace {

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
        const uint64_t product0 = uint64_t{counter.at[0]} * 0xD2511F53u, product1 = uint64_t{counter.at[2]} * 0xCD9E8D57u;
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

// What a thread needs to take one field through its steps.
class Worker {
  public:
    Worker(const Net& net, const Data& data, bool backward)
        : net(net), data(data), sampler(data), across((net.width + LANES - 1) / LANES), stride(across * LANES + LANES), first(net.omega_0),
          hidden(net.omega_hidden) {
        const int64_t most_points = backward ? data.taken : data.available;
        size = (net.dimensions + 1) * net.width + (net.depth - 1) * (net.width + 1) * net.width +
               (net.width + 1) * net.channels;
        int64_t buffers = backward ? 2 * net.depth : net.depth;
        int64_t most = TILE_BYTES / (buffers * stride * static_cast<int64_t>(sizeof(float)));
        most = std::clamp(most, FEWEST_POINTS, MOST_POINTS) / 8 * 8;
        int64_t tiles = std::max<int64_t>(1, (most_points + most - 1) / most);
        tile = rounded_up(std::max<int64_t>(1, (most_points + tiles - 1) / tiles), 8);
        const int64_t lanes = across * LANES;
        int64_t total = 0;
        auto place = [&](int64_t floats) {
            int64_t at = total;
            total += rounded_up(floats, LANES);
            return at;
        };
        std::vector<int64_t> at;
        for (int64_t layer = 0; layer < net.depth; layer++) {
            at.push_back(place(inputs(layer) * lanes));                         // forward weights
            at.push_back(place(lanes));                                         // forward bias
            at.push_back(place(layer && backward ? net.width * lanes : 0));     // backward weights
            at.push_back(place(tile * stride));                                 // outputs
            at.push_back(place(backward ? tile * stride : 0));                  // slopes, then gradients
            at.push_back(place(backward ? std::max(inputs(layer), net.width) * lanes : 0));  // weight gradients
            at.push_back(place(backward ? lanes : 0));                          // bias gradients
        }
        int64_t last_at = place(net.channels * lanes), last_gradient_at = place(backward ? net.channels * lanes : 0);
        int64_t points_at = place(tile * net.dimensions), values_at = place(tile * net.channels);
        int64_t weights_at = place(tile), outputs_at = place(tile * net.channels);
        int64_t last_bias_at = place(net.channels), last_bias_gradient_at = place(net.channels);
        int64_t row_at = place(size), gradient_at = place(size), first_at = place(size), second_at = place(size);
        memory = static_cast<float*>(std::aligned_alloc(64, total * sizeof(float)));
        if (!memory) {
            return;
        }
        std::memset(memory, 0, total * sizeof(float));
        for (int64_t layer = 0; layer < net.depth; layer++) {
            const int64_t* of = &at[7 * layer];
            layers.push_back({memory + of[0], memory + of[1], memory + of[2], memory + of[3], memory + of[4],
                              memory + of[5], memory + of[6]});
        }
        last = memory + last_at;
        last_gradient = memory + last_gradient_at;
        points = memory + points_at;
        values = memory + values_at;
        weights = memory + weights_at;
        outputs = memory + outputs_at;
        last_bias = memory + last_bias_at;
        last_bias_gradient = memory + last_bias_gradient_at;
        row = memory + row_at;
        gradient = memory + gradient_at;
        moments[0] = memory + first_at;
        moments[1] = memory + second_at;
    }
    Worker(const Worker&) = delete;
    Worker& operator=(const Worker&) = delete;
    ~Worker() { std::free(memory); }

    bool ready() const { return memory != nullptr; }
    int64_t params() const { return size; }

    // All steps of one field, from and to its rows of weights and moments.
    void advance(int64_t field, int64_t step_count, const Update& update, float* rows) {
        std::memcpy(row, rows + field * size, size * sizeof(float));
        std::memcpy(moments[0], update.first + field * size, size * sizeof(float));
        if (update.kind == 0) {
            std::memcpy(moments[1], update.second + field * size, size * sizeof(float));
        }
        sampler.begin(field);
        for (int64_t step = 0; step < step_count; step++) {
            pack(true);
            differentiate(field, sampler.at(step));
            int64_t at = field * step_count + step;
            if (update.kind == 0) {
                adam(update, at);
            } else {
                preconditioned(update, at);
            }
        }
        std::memcpy(rows + field * size, row, size * sizeof(float));
        std::memcpy(update.first + field * size, moments[0], size * sizeof(float));
        if (update.kind == 0) {
            std::memcpy(update.second + field * size, moments[1], size * sizeof(float));
        }
    }

    // Loss and gradient of one field at its row of weights.
    float differentiate(int64_t field, const float* from, float* gradient_to) {
        std::memcpy(row, from, size * sizeof(float));
        pack(true);
        double loss = differentiate(field, nullptr);
        std::memcpy(gradient_to, gradient, size * sizeof(float));
        return static_cast<float>(loss);
    }

    // Values of one field: [available, C].
    void apply(int64_t field, const float* from, float* to) {
        std::memcpy(row, from, size * sizeof(float));
        pack(false);
        for (int64_t start = 0; start < data.available; start += tile) {
            int64_t count = std::min(tile, data.available - start);
            gather(field, nullptr, start, count, 0.0f);
            forward<false>(rounded_up(count, ROWS));
            evaluate(count);
            std::memcpy(to + start * net.channels, outputs, count * net.channels * sizeof(float));
        }
    }

  private:
    struct Layer {
        float *forward, *bias, *backward, *output, *slope, *weight_gradient, *bias_gradient;
    };

    const Net net;
    const Data data;
    Sampler sampler;
    const int64_t across, stride;  // groups of 16 lanes in a layer; floats from one point to the next
    const Cosine first, hidden;
    int64_t size = 0, tile = 0;
    float* memory = nullptr;
    std::vector<Layer> layers;
    float *last, *last_gradient, *points, *values, *weights, *outputs, *last_bias, *last_bias_gradient;
    float *row, *gradient, *moments[2];

    int64_t inputs(int64_t layer) const { return layer ? net.width : net.dimensions; }

    // Where a layer's weights [out, in] and its bias [out] lie in a row.
    int64_t offset(int64_t layer) const {
        return layer ? (net.dimensions + 1) * net.width + (layer - 1) * (net.width + 1) * net.width : 0;
    }

    static void transpose(const float* from, int64_t from_row, float* to, int64_t to_row, int64_t rows_, int64_t columns_,
                          float scale) {
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

    // Lay the row out as the products read it. Lanes beyond the width stay zero.
    void pack(bool backward) {
        const int64_t width = net.width;
        for (int64_t index = 0; index < net.depth; index++) {
            Layer& layer = layers[index];
            const float* from = row + offset(index);
            const int64_t in = inputs(index);
            const float scale =
                static_cast<float>((index ? net.omega_hidden : net.omega_0) / 3.14159265358979323846);
            for (int64_t o = 0; o < width; o += 4) {  // forward: [group of o][i][16 lanes of o]
                float* to = layer.forward + o / LANES * in * LANES + o % LANES;
                int64_t height = std::min<int64_t>(4, width - o);
                for (int64_t i = 0; i < in; i += 4) {
                    transpose(from + o * in + i, in, to + i * LANES, LANES, height, std::min<int64_t>(4, in - i), scale);
                }
            }
            const float* bias = from + width * in;
            for (int64_t o = 0; o < width; o++) {
                layer.bias[o] = scale * bias[o];
            }
            if (index && backward) {  // backward: [group of i][o][16 lanes of i]
                spread(from, width, layer.backward);
            }
        }
        const float* from = row + offset(net.depth);
        spread(from, net.channels, last);
        std::memcpy(last_bias, from + net.channels * width, net.channels * sizeof(float));
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

    template <bool WITH_COSINE>
    void forward(int64_t count) {
        for (int64_t index = 0; index < net.depth; index++) {
            const Layer& layer = layers[index];
            const float* before = index ? layers[index - 1].output : points;
            const int64_t in = inputs(index), before_row = index ? stride : net.dimensions;
            const Cosine& cosine = index ? hidden : first;
            auto start = [&](int64_t j) { return load(layer.bias + j * LANES); };
            auto done = [&](int64_t m, int64_t j, auto& sums) { activate<WITH_COSINE>(layer, cosine, m, j, sums); };
            product<false>(count, across, in, before, before_row, layer.forward, LANES, in * LANES, start, done);
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

    // The linear layer: values of the tile's points.
    void evaluate(int64_t count) {
        const float* before = layers.back().output;
        for (int64_t point = 0; point < count; point++) {
            for (int64_t c = 0; c < net.channels; c++) {
                V total = same(0.0f);
                for (int64_t group = 0; group < across; group++) {
                    total = fused(load(before + point * stride + group * LANES),
                                  load(last + (group * net.channels + c) * LANES), total);
                }
                outputs[point * net.channels + c] = sum(total) + last_bias[c];
            }
        }
    }

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

    // The loss of a step, and its gradient in the order of the row.
    double differentiate(int64_t field, const int64_t* positions) {
        const float share = static_cast<float>(1.0 / total_weight(field, positions));
        double loss = 0.0;
        for (int64_t start = 0; start < data.taken; start += tile) {
            int64_t count = std::min(tile, data.taken - start);
            int64_t filled = rounded_up(count, ROWS);
            gather(field, positions, start, count, share);
            forward<true>(filled);
            evaluate(count);
            loss += residuals(count);
            std::fill(outputs + count * net.channels, outputs + filled * net.channels, 0.0f);
            backward(filled, start == 0);
        }
        collect();
        return loss;
    }

    // Outputs become the gradients of the loss with respect to them.
    double residuals(int64_t count) {
        double loss = 0.0;
        const float per_channel = 2.0f / static_cast<float>(net.channels);
        for (int64_t point = 0; point < count; point++) {
            double squares = 0.0;
            for (int64_t c = 0; c < net.channels; c++) {
                const int64_t at = point * net.channels + c;
                const float residual = outputs[at] - values[at];
                squares += static_cast<double>(residual) * residual;
                outputs[at] = residual * per_channel * weights[point];
            }
            loss += squares / static_cast<double>(net.channels) * weights[point];
        }
        return loss;
    }

    void backward(int64_t count, bool begins) {
        const auto zero = [](int64_t) { return same(0.0f); };
        const auto gathered = [&](float* to, int64_t to_row) {
            return [=](int64_t m, int64_t j, auto& sums) { add_to(to, to_row, begins, m, j, sums); };
        };
        const auto times_slope = [&](float* slope) {
            return [=](int64_t m, int64_t j, auto& sums) { multiply(slope, m, j, sums); };
        };
        const Layer& top = layers.back();
        const int64_t lanes = across * LANES, channels = net.channels;
        product<true>(channels, across, count, outputs, channels, top.output, stride, LANES, zero,
                      gathered(last_gradient, lanes));
        for (int64_t c = 0; c < channels; c++) {
            double total = begins ? 0.0 : last_bias_gradient[c];
            for (int64_t point = 0; point < count; point++) {
                total += outputs[point * channels + c];
            }
            last_bias_gradient[c] = static_cast<float>(total);
        }
        product<false>(count, across, channels, outputs, channels, last, LANES, channels * LANES, zero,
                       times_slope(top.slope));
        for (int64_t index = net.depth - 1; index >= 0; index--) {
            const Layer& layer = layers[index];
            sum_rows(layer.slope, count, begins, layer.bias_gradient);
            if (!index) {
                product<true>(net.dimensions, across, count, points, net.dimensions, layer.slope, stride, LANES, zero,
                              gathered(layer.weight_gradient, lanes));  // [D, out]
                break;
            }
            const Layer& below = layers[index - 1];
            product<true>(net.width, across, count, layer.slope, stride, below.output, stride, LANES, zero,
                          gathered(layer.weight_gradient, lanes));  // [out, in]
            product<false>(count, across, net.width, layer.slope, stride, layer.backward, LANES, net.width * LANES,
                           zero, times_slope(below.slope));
        }
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

    // Gradients with respect to what goes into a sine, in place of its slopes.
    template <int M, int N>
    INLINE void multiply(float* slope, int64_t m, int64_t j, V (&sums)[M][N]) const {
        for (int row_ = 0; row_ < M; row_++) {
            for (int column = 0; column < N; column++) {
                float* at = slope + (m + row_) * stride + (j + column) * LANES;
                store(at, load(at) * sums[row_][column]);
            }
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

    // Gradients from the groups of lanes into the order of the row.
    void collect() {
        const int64_t width = net.width, lanes = across * LANES;
        for (int64_t index = 0; index < net.depth; index++) {
            const Layer& layer = layers[index];
            float* to = gradient + offset(index);
            if (index) {
                for (int64_t o = 0; o < width; o++) {
                    std::memcpy(to + o * width, layer.weight_gradient + o * lanes, width * sizeof(float));
                }
            } else {
                for (int64_t o = 0; o < width; o++) {
                    for (int64_t d = 0; d < net.dimensions; d++) {
                        to[o * net.dimensions + d] = layer.weight_gradient[d * lanes + o];
                    }
                }
            }
            std::memcpy(to + width * inputs(index), layer.bias_gradient, width * sizeof(float));
        }
        float* to = gradient + offset(net.depth);
        for (int64_t c = 0; c < net.channels; c++) {
            std::memcpy(to + c * width, last_gradient + c * lanes, width * sizeof(float));
        }
        std::memcpy(to + net.channels * width, last_bias_gradient, net.channels * sizeof(float));
    }

    void adam(const Update& update, int64_t at) {
        const V beta1 = same(static_cast<float>(update.beta1)), rest1 = same(static_cast<float>(1 - update.beta1));
        const V beta2 = same(static_cast<float>(update.beta2)), rest2 = same(static_cast<float>(1 - update.beta2));
        const V epsilon = same(static_cast<float>(update.epsilon)), correction = same(1 / update.correction[at]);
        const V step_size = same(update.step_size[at]);
        for (int64_t p = 0; p < size; p += LANES) {  // buffers end at a multiple of the lanes, in zeros
            V g = load(gradient + p);
            V mean = load(moments[0] + p) * beta1 + g * rest1;
            V square = load(moments[1] + p) * beta2 + g * g * rest2;
            store(moments[0] + p, mean);
            store(moments[1] + p, square);
            store(row + p, load(row + p) - mean / (root(square) * correction + epsilon) * step_size);
        }
    }

    void preconditioned(const Update& update, int64_t at) {
        const V beta1 = same(static_cast<float>(update.beta1)), rest1 = same(static_cast<float>(1 - update.beta1));
        const float* inverse = update.inverse_diagonal + update.diagonal_row[at] * size;
        V squares = same(0.0f);
        const int64_t whole = size / LANES * LANES;
        float tail[LANES] = {};
        std::memcpy(tail, inverse + whole, (size - whole) * sizeof(float));
        for (int64_t p = 0; p < size; p += LANES) {
            V momentum = load(moments[0] + p) * beta1 + load(gradient + p) * rest1;
            V direction = momentum * load(p < whole ? inverse + p : tail);
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
};

// Give each of the jobs to one of the threads, this one among them; false where memory ran out.
template <class Work>
bool share_out(const Net& net, const Data& data, bool backward, int64_t jobs, int64_t threads, const Work& work) {
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    auto serve = [&] {
        Worker worker(net, data, backward);
        if (!worker.ready()) {
            failed = true;
            return;
        }
        for (int64_t job; (job = next.fetch_add(1)) < jobs;) {
            work(worker, job);
        }
    };
    std::vector<std::thread> others;
    try {
        for (int64_t i = 1; i < std::min(threads, jobs); i++) {
            others.emplace_back(serve);
        }
    } catch (const std::system_error&) {
        // The machine grants no more threads: those that run do all.
    }
    serve();
    for (std::thread& other : others) {
        other.join();
    }
    return !failed;
}

}  // namespace

extern "C" {

// Each returns 0, or 1 where memory ran out. `fields` are the indices of `jobs` fields of the batch.

int nfscale_advance(const Net* net, const Data* data, const Update* update, const int64_t* fields, int64_t jobs,
                    int64_t step_count, float* rows, int64_t threads) {
    return !share_out(*net, *data, true, jobs, threads, [=](Worker& worker, int64_t job) {
        worker.advance(fields[job], step_count, *update, rows);
    });
}

int nfscale_gradient(const Net* net, const Data* data, int64_t jobs, const float* rows, float* losses,
                     float* gradients, int64_t threads) {
    return !share_out(*net, *data, true, jobs, threads, [=](Worker& worker, int64_t job) {
        const int64_t at = job * worker.params();
        losses[job] = worker.differentiate(job, rows + at, gradients + at);
    });
}

int nfscale_apply(const Net* net, const Data* data, int64_t jobs, const float* rows, float* values, int64_t threads) {
    return !share_out(*net, *data, false, jobs, threads, [=](Worker& worker, int64_t job) {
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
