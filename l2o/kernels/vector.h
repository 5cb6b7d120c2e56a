// Vectors of floats, of whatever width the machine has, and the matrix products that both kernels are made of.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif

typedef float vec __attribute__((vector_size(WIDTH * 4)));
typedef int32_t ivec __attribute__((vector_size(WIDTH * 4)));
typedef float unaligned_vec __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));

// V is `vec`, or `float` for what a row has beyond whole vectors.
template <class V> inline V load(const float* p) { return *p; }
template <> inline vec load<vec>(const float* p) { return *reinterpret_cast<const unaligned_vec*>(p); }
inline void store(float* p, float x) { *p = x; }
inline void store(float* p, vec x) { *reinterpret_cast<unaligned_vec*>(p) = x; }

// x, held in a register where the compiler would rather read it from memory at each use: loads are what bounds a tile.
template <class V> inline V held(V x) {
#if defined(__x86_64__)
    asm("" : "+x"(x));
#elif defined(__aarch64__)
    asm("" : "+w"(x));
#endif
    return x;
}

inline float sum(vec x) {
    typedef float quad __attribute__((vector_size(16)));
    quad parts[WIDTH / 4], total = {};
    std::memcpy(parts, &x, sizeof x);
    for (const quad& part : parts) total += part;
    return (total[0] + total[1]) + (total[2] + total[3]);
}

inline int64_t padded(int64_t n) { return (n + WIDTH - 1) / WIDTH * WIDTH; }

// f(V{}, i) over 0 <= i < n: vectors, then the remaining floats. V{} is zero and says which of the two it is.
template <class F> inline void sweep(int64_t n, F f) {
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) f(vec{}, i);
    for (; i < n; i++) f(float{}, i);
}

// exp to 2 ulp: 2^k by the exponent's bits, in two factors that reach denormals and infinity, times a polynomial on
// [-ln2/2, ln2/2] (the coefficients of Cephes' expf). NaN stays NaN.
inline vec exp(vec x) {
    const vec least = vec{} - 105.0f, most = vec{} + 89.0f;
    x = x < least ? least : x;
    x = x > most ? most : x;
    const vec shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to a whole number
    const vec k = shifted - 12582912.0f;
    const vec r = (x - k * 0.693359375f) - k * -2.12194440e-4f;
    vec p = vec{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const ivec whole = __builtin_convertvector(k, ivec), half = whole >> 1;
    const ivec low = (half + 127) << 23, high = (whole - half + 127) << 23;
    return p * (vec)low * (vec)high;
}

// R x Q vectors of C = finish(start + A B). A[m, k] is a[m * am + k * ak]; rows of B, ldb apart, and of C are contiguous.
// Not inlined: what the caller keeps in registers would push sums out of them.
template <class V, int R, int Q, class Start, class Finish>
__attribute__((noinline)) void tile(int64_t m, int64_t n, int64_t depth, const float* a, int64_t am, int64_t ak,
                                    const float* b, int64_t ldb, float* c, int64_t ldc, Start start, Finish finish) {
    constexpr int step = sizeof(V) / sizeof(float);
    V acc[R][Q];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int q = 0; q < Q; q++) acc[r][q] = start(V{}, m + r, n + q * step);
    a += m * am;
    b += n;
    for (int64_t k = 0; k < depth; k++, a += ak, b += ldb) {
        V x[Q];
#pragma GCC unroll 16
        for (int q = 0; q < Q; q++) x[q] = held(load<V>(b + q * step));
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            const float weight = a[r * am];
#pragma GCC unroll 16
            for (int q = 0; q < Q; q++) acc[r][q] += weight * x[q];
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int q = 0; q < Q; q++) store(c + (m + r) * ldc + n + q * step, finish(acc[r][q], m + r, n + q * step));
}

template <class V, int R, int Q, class Start, class Finish>
inline void strip(int64_t rows, int64_t n, int64_t depth, const float* a, int64_t am, int64_t ak, const float* b,
                  int64_t ldb, float* c, int64_t ldc, Start start, Finish finish) {
    int64_t m = 0;
    for (; m + R <= rows; m += R) tile<V, R, Q>(m, n, depth, a, am, ak, b, ldb, c, ldc, start, finish);
    for (; m + 2 <= rows; m += 2) tile<V, 2, Q>(m, n, depth, a, am, ak, b, ldb, c, ldc, start, finish);
    for (; m < rows; m++) tile<V, 1, Q>(m, n, depth, a, am, ak, b, ldb, c, ldc, start, finish);
}

// C = finish(start + A B), see `tile`, in tiles of R rows and Q vectors, whose R * Q sums stay in registers.
// start(V{}, m, n) and finish(sum, m, n) return a V for the entries from (m, n) on.
template <int R, int Q, class Start, class Finish>
void multiply(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t am, int64_t ak, const float* b,
              int64_t ldb, float* c, int64_t ldc, Start start, Finish finish) {
    int64_t n = 0;
    for (; n + Q * WIDTH <= columns; n += Q * WIDTH)
        strip<vec, R, Q>(rows, n, depth, a, am, ak, b, ldb, c, ldc, start, finish);
    for (; n + WIDTH <= columns; n += WIDTH)
        strip<vec, R, 1>(rows, n, depth, a, am, ak, b, ldb, c, ldc, start, finish);
    for (; n < columns; n++) strip<float, R, 1>(rows, n, depth, a, am, ak, b, ldb, c, ldc, start, finish);
}

// C[i, j] += A[i] . B[j], rows of A and of B contiguous, lda and ldb apart. C holds vectors whose elements are still to
// be added up: entries of the result are needed once, after many blocks.
template <int R, int Q>
__attribute__((noinline)) void dot_tile(int64_t length, const float* a, int64_t lda, const float* b, int64_t ldb, vec* c,
                                        int64_t ldc) {
    vec acc[R][Q] = {};
    for (int64_t k = 0; k < length; k += WIDTH) {
        vec y[Q];
#pragma GCC unroll 16
        for (int q = 0; q < Q; q++) y[q] = held(load<vec>(b + q * ldb + k));
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            const vec x = held(load<vec>(a + r * lda + k));
#pragma GCC unroll 16
            for (int q = 0; q < Q; q++) acc[r][q] += x * y[q];
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int q = 0; q < Q; q++) c[r * ldc + q] += acc[r][q];
}

template <int R>
inline void dot_rows(int64_t columns, int64_t length, const float* a, int64_t lda, const float* b, int64_t ldb, vec* c,
                     int64_t ldc) {
    int64_t j = 0;
    for (; j + 4 <= columns; j += 4) dot_tile<R, 4>(length, a, lda, b + j * ldb, ldb, c + j, ldc);
    for (; j + 2 <= columns; j += 2) dot_tile<R, 2>(length, a, lda, b + j * ldb, ldb, c + j, ldc);
    for (; j < columns; j++) dot_tile<R, 1>(length, a, lda, b + j * ldb, ldb, c + j, ldc);
}

inline void add_dots(int64_t rows, int64_t columns, int64_t length, const float* a, int64_t lda, const float* b,
                     int64_t ldb, vec* c) {
    int64_t i = 0;
    for (; i + 3 <= rows; i += 3) dot_rows<3>(columns, length, a + i * lda, lda, b, ldb, c + i * columns, columns);
    for (; i < rows; i++) dot_rows<1>(columns, length, a + i * lda, lda, b, ldb, c + i * columns, columns);
}
