// Vectors of floats, of whatever width the machine has, and the matrix products that both kernels are made of.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "layout.h"

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

// All elements of x by one operation of two vectors, or of two floats.
template <class F> inline float fold(vec x, F f) {
    typedef float quad __attribute__((vector_size(16)));
    quad parts[WIDTH / 4];
    std::memcpy(parts, &x, sizeof x);
    for (int i = 1; i < WIDTH / 4; i++) parts[0] = f(parts[0], parts[i]);
    return f(f(parts[0][0], parts[0][1]), f(parts[0][2], parts[0][3]));
}

inline float sum(vec x) {
    return fold(x, [](auto a, auto b) { return a + b; });
}

inline float largest(vec x) {
    return fold(x, [](auto a, auto b) { return a > b ? a : b; });
}

inline int64_t padded(int64_t n) { return (n + WIDTH - 1) / WIDTH * WIDTH; }

// f(V{}, i) over 0 <= i < n: vectors, then the remaining floats. V{} is zero and says which of the two it is.
template <class F> inline void sweep(int64_t n, F f) {
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) f(vec{}, i);
    for (; i < n; i++) f(float{}, i);
}

// exp to 2 ulp: 2^k by the exponent's bits, in two factors that reach infinity, times 1 + r + r^2 q(r) on |r| <= ln2 / 2,
// where the polynomial q was fitted to a relative error of 3e-9. Denormal results are 0, NaN stays NaN.
inline vec exp(vec x) {
    const vec least = vec{} - 87.3f, most = vec{} + 89.0f;
    const ivec vanishes = x < least;
    x = vanishes ? least : x;
    x = x > most ? most : x;
    const vec k = x * 1.44269504f + 12582912.0f - 12582912.0f;  // 1.5 * 2^23: rounds to a whole number
    const vec r = (x - k * 0.693359375f) - k * -2.12194440e-4f;  // ln2 in two parts, the first of few bits
    vec q = vec{} + 1.381316043e-3f;
    q = q * r + 8.369410770e-3f;
    q = q * r + 4.166845600e-2f;
    q = q * r + 1.666651486e-1f;
    q = q * r + 4.999999306e-1f;
    const ivec whole = __builtin_convertvector(k, ivec), half = whole >> 1;
    const ivec low = (half + 127) << 23, high = (whole - half + 127) << 23;
    const vec y = (q * r * r + r + 1.0f) * (vec)low * (vec)high;
    return vanishes ? vec{} : y;
}

// log of positive numbers that are not denormal, to 1 ulp; NaN stays NaN, and so does infinity.
inline vec log(vec x) {
    const ivec bits = (ivec)x;
    ivec power = (bits >> 23) - 126;
    vec m = (vec)((bits & 0x007fffff) | 0x3f000000);  // from 0.5 to 1
    const ivec low = m < 0.707106781f;
    power += low;  // -1 where it holds
    m = (low ? m + m : m) - 1.0f;
    const vec e = __builtin_convertvector(power, vec), z = m * m;
    vec q = vec{} + 7.0376836292e-2f;
    q = q * m - 1.1514610310e-1f;
    q = q * m + 1.1676998740e-1f;
    q = q * m - 1.2420140846e-1f;
    q = q * m + 1.4249322787e-1f;
    q = q * m - 1.6668057665e-1f;
    q = q * m + 2.0000714765e-1f;
    q = q * m - 2.4999993993e-1f;
    q = q * m + 3.3333331174e-1f;
    const vec y = m * z * q + e * -2.12194440e-4f - z * 0.5f + m + e * 0.693359375f;
    return x <= std::numeric_limits<float>::max() ? y : x;
}

// tanh to 2 ulp: by exp, and near 0 by an odd polynomial fitted to 4e-9.
inline vec tanh(vec x) {
    const vec size = x < 0 ? -x : x, square = x * x;
    const vec e = exp(size * -2.0f), far = (1.0f - e) / (1.0f + e);
    vec q = vec{} - 5.717044510e-3f;
    q = q * square + 2.065058678e-2f;
    q = q * square - 5.374349792e-2f;
    q = q * square + 1.333149128e-1f;
    q = q * square - 3.333328393e-1f;
    return size < 0.625f ? q * square * x + x : (x < 0 ? -far : far);
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
