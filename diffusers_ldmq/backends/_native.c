/* Elementwise passes around the integer kernels, each reading and writing memory once: float -> codes, accumulators ->
 * output, codes -> float weight. Arithmetic is that of affine.py, operation by operation (compiled without contraction
 * of a*b+c), so that codes are equal bit for bit. Plain C without torch headers: see native.py for how it is built.
 *
 * kind: 0 = fp32, 1 = bf16. A NaN becomes the lowest code. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define TILE 64
#define WORTH_THREADS 32768

static inline float from_fp32(const float *p) { return *p; }
static inline float from_bf16(const uint16_t *p) {
    uint32_t bits = (uint32_t)*p << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
static inline void to_fp32(float *p, float value) { *p = value; }
static inline void to_bf16(uint16_t *p, float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    *p = value != value ? 0x7fc0 : (uint16_t)rounded;
}

typedef struct {
    const float *pre; /* [columns] or NULL; multiplies the input */
    float reciprocal; /* 1 / scale; unused where scales come with the call */
    float zero, low, high; /* all plus 128: codes leave as u8 */
    int64_t columns; /* K or C: length of a row of the output */
} Quantizer;

static inline uint8_t code(float x, float reciprocal, const Quantizer *q) {
    float v = rintf(x * reciprocal) + q->zero;
    v = v > q->low ? v : q->low;
    v = v < q->high ? v : q->high;
    return (uint8_t)(int32_t)v;
}

/* scale of symmetric codes with absmax at `highest`, as affine.symmetric_qparams */
static inline float symmetric_scale(float absmax, float highest) {
    float scale = absmax / highest, smallest = 0x1p-100f;
    return scale < smallest ? smallest : scale;
}

#define FOR_KIND(NAME, T, LOAD)                                                                                       \
    static void NAME##_row(const T *x, uint8_t *out, float r, const Quantizer *q) {                                   \
        const float *pre = q->pre;                                                                                    \
        int64_t n = q->columns;                                                                                       \
        if (pre)                                                                                                      \
            for (int64_t i = 0; i < n; i++) out[i] = code(LOAD(x + i) * pre[i], r, q);                                \
        else                                                                                                          \
            for (int64_t i = 0; i < n; i++) out[i] = code(LOAD(x + i), r, q);                                         \
    }                                                                                                                 \
    /* NaN must survive: an integer maximum over the bits of |x| orders it above infinity */                          \
    static float NAME##_absmax(const T *x, const float *pre, int64_t n) {                                             \
        int32_t most = 0;                                                                                             \
        for (int64_t i = 0; i < n; i++) {                                                                             \
            float v = pre ? LOAD(x + i) * pre[i] : LOAD(x + i);                                                       \
            int32_t bits;                                                                                             \
            memcpy(&bits, &v, 4);                                                                                     \
            bits &= 0x7fffffff;                                                                                       \
            most = bits > most ? bits : most;                                                                         \
        }                                                                                                             \
        float result;                                                                                                 \
        memcpy(&result, &most, 4);                                                                                    \
        return result;                                                                                                \
    }                                                                                                                 \
    /* one block of [channels, pixels] -> [pixels, channels] */                                                       \
    static void NAME##_tile(const T *x, uint8_t *out, int64_t pixels, int64_t c0, int64_t np, float r,                \
                            const Quantizer *q) {                                                                     \
        uint8_t tile[TILE][TILE];                                                                                     \
        int64_t nc = q->columns - c0 < TILE ? q->columns - c0 : TILE;                                                 \
        for (int64_t c = 0; c < nc; c++) {                                                                            \
            const T *plane = x + (c0 + c) * pixels;                                                                   \
            float pre = q->pre ? q->pre[c0 + c] : 1.0f;                                                               \
            for (int64_t p = 0; p < np; p++) tile[c][p] = code(LOAD(plane + p) * pre, r, q);                          \
        }                                                                                                             \
        for (int64_t p = 0; p < np; p++)                                                                              \
            for (int64_t c = 0; c < nc; c++) out[p * q->columns + c0 + c] = tile[c][p];                               \
    }

FOR_KIND(fp32, float, from_fp32)
FOR_KIND(bf16, uint16_t, from_bf16)

/* x: contiguous rows [rows, columns] -> out u8 of that shape. scales: one per `share` rows, or NULL for the static
 * reciprocal. */
void ldmq_quantize_rows(const Quantizer *q, const void *x, int kind, uint8_t *out, int64_t rows, const float *scales,
                        int64_t share, int threads) {
    int64_t n = q->columns;
#pragma omp parallel for num_threads(threads) if (rows * n > WORTH_THREADS)
    for (int64_t i = 0; i < rows; i++) {
        float r = scales ? 1.0f / scales[i / share] : q->reciprocal;
        if (kind)
            bf16_row((const uint16_t *)x + i * n, out + i * n, r, q);
        else
            fp32_row((const float *)x + i * n, out + i * n, r, q);
    }
}

/* x: [images, columns, pixels], as a contiguous NCHW tensor -> out u8 [images, pixels, columns] (channels_last).
 * scales: one per image, or NULL. */
void ldmq_quantize_planes(const Quantizer *q, const void *x, int kind, uint8_t *out, int64_t images, int64_t pixels,
                          const float *scales, int threads) {
    int64_t n = q->columns, blocks = (pixels + TILE - 1) / TILE, groups = (n + TILE - 1) / TILE;
#pragma omp parallel for collapse(2) num_threads(threads) if (images * pixels * n > WORTH_THREADS)
    for (int64_t i = 0; i < images; i++)
        for (int64_t b = 0; b < blocks * groups; b++) {
            int64_t p0 = b / groups * TILE, c0 = b % groups * TILE, np = pixels - p0 < TILE ? pixels - p0 : TILE;
            uint8_t *to = out + (i * pixels + p0) * n;
            float r = scales ? 1.0f / scales[i] : q->reciprocal;
            if (kind)
                bf16_tile((const uint16_t *)x + i * n * pixels + p0, to, pixels, c0, np, r, q);
            else
                fp32_tile((const float *)x + i * n * pixels + p0, to, pixels, c0, np, r, q);
        }
}

/* Symmetric dynamic codes of each row, scale found on the way: x [rows, columns] -> out u8, scales fp32 [rows]. */
void ldmq_quantize_tokens(const Quantizer *q, const void *x, int kind, uint8_t *out, int64_t rows, float *scales,
                          float highest, int threads) {
    int64_t n = q->columns;
#pragma omp parallel for num_threads(threads) if (rows * n > WORTH_THREADS)
    for (int64_t i = 0; i < rows; i++) {
        if (kind) {
            const uint16_t *row = (const uint16_t *)x + i * n;
            scales[i] = symmetric_scale(bf16_absmax(row, q->pre, n), highest);
            bf16_row(row, out + i * n, 1.0f / scales[i], q);
        } else {
            const float *row = (const float *)x + i * n;
            scales[i] = symmetric_scale(fp32_absmax(row, q->pre, n), highest);
            fp32_row(row, out + i * n, 1.0f / scales[i], q);
        }
    }
}

/* Maxima of |x| over `parts` pieces of each contiguous image of `length` elements -> fp32 [images, parts]. */
void ldmq_absmax(const void *x, int kind, int64_t images, int64_t length, float *out, int64_t parts, int threads) {
    int64_t piece = (length + parts - 1) / parts;
#pragma omp parallel for num_threads(threads) if (images * length > WORTH_THREADS)
    for (int64_t i = 0; i < images * parts; i++) {
        int64_t start = i % parts * piece, end = start + piece < length ? start + piece : length;
        int64_t at = i / parts * length + start, n = end > start ? end - start : 0;
        out[i] = kind ? bf16_absmax((const uint16_t *)x + at, 0, n) : fp32_absmax((const float *)x + at, 0, n);
    }
}

/* y = acc * scale of its row + bias. acc: fp32 [rows, columns]; scales: one per `share` rows; bias [columns] or NULL;
 * out: of `kind`. */
void ldmq_scale_rows(const float *acc, void *out, int kind, int64_t rows, int64_t columns, const float *scales,
                     int64_t share, const float *bias, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * columns > WORTH_THREADS)
    for (int64_t i = 0; i < rows; i++) {
        const float *from = acc + i * columns;
        float s = scales[i / share];
        if (kind) {
            uint16_t *to = (uint16_t *)out + i * columns;
            for (int64_t j = 0; j < columns; j++) to_bf16(to + j, bias ? from[j] * s + bias[j] : from[j] * s);
        } else {
            float *to = (float *)out + i * columns;
            for (int64_t j = 0; j < columns; j++) to_fp32(to + j, bias ? from[j] * s + bias[j] : from[j] * s);
        }
    }
}

#define DEQUANTIZE(T, STORE)                                                                                          \
    for (int64_t j = 0; j < columns; j++)                                                                             \
        STORE((T *)out + i * columns + j, (float)from[j] * (group ? s[group[j]] : s[0]))

/* w = code * its scale. codes: int8 [rows, columns]; scales: fp32 [rows, groups]; group: of each column, or NULL where
 * a row has one scale; out: of `kind`. */
void ldmq_dequantize_rows(const int8_t *codes, void *out, int kind, int64_t rows, int64_t columns, const float *scales,
                          int64_t groups, const int32_t *group, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * columns > WORTH_THREADS)
    for (int64_t i = 0; i < rows; i++) {
        const int8_t *from = codes + i * columns;
        const float *s = scales + i * groups;
        if (kind)
            DEQUANTIZE(uint16_t, to_bf16);
        else
            DEQUANTIZE(float, to_fp32);
    }
}

static inline int8_t nibble(const uint8_t *row, int64_t k) { return (int8_t)((row[k / 2] >> (k % 2 * 4)) & 15) - 8; }

/* Packed 4-bit codes -> int8 codes -8..7, kernel positions before channels. packed: u8 [rows, ceil(K / 2)] of columns
 * that run over [channels, positions]; out: [rows, K], columns running over [positions, channels]. */
void ldmq_unpack_rows(const uint8_t *packed, int8_t *out, int64_t rows, int64_t channels, int64_t positions,
                      int threads) {
    int64_t n = channels * positions, width = (n + 1) / 2;
#pragma omp parallel for num_threads(threads) if (rows * n > WORTH_THREADS)
    for (int64_t i = 0; i < rows; i++) {
        const uint8_t *from = packed + i * width;
        int8_t *to = out + i * n;
        if (positions == 1)
            for (int64_t k = 0; k < n; k++) to[k] = nibble(from, k);
        else
            for (int64_t c = 0, k = 0; c < channels; c++)
                for (int64_t p = 0; p < positions; p++) to[p * channels + c] = nibble(from, k++);
    }
}

/* The same with out [K, rows]. */
void ldmq_unpack_columns(const uint8_t *packed, int8_t *out, int64_t rows, int64_t channels, int64_t positions,
                         int threads) {
    int64_t n = channels * positions, width = (n + 1) / 2;
#pragma omp parallel for num_threads(threads) if (rows * n > WORTH_THREADS)
    for (int64_t k0 = 0; k0 < n; k0 += TILE) {
        int8_t tile[TILE][TILE];
        int64_t nk = n - k0 < TILE ? n - k0 : TILE;
        for (int64_t i0 = 0; i0 < rows; i0 += TILE) {
            int64_t ni = rows - i0 < TILE ? rows - i0 : TILE;
            for (int64_t i = 0; i < ni; i++)
                for (int64_t k = 0; k < nk; k++) tile[k][i] = nibble(packed + (i0 + i) * width, k0 + k);
            for (int64_t k = 0; k < nk; k++)
                memcpy(out + ((k0 + k) % positions * channels + (k0 + k) / positions) * rows + i0, tile[k], ni);
        }
    }
}

/* 2^x for x <= 0: five terms of the series about the nearest integer, relative error 2e-6; 0 below the smallest code */
static inline float power_of_two(float x) {
    float limited = x < -60.0f ? -60.0f : x, whole = rintf(limited), t = limited - whole;
    float fraction = 1.0f + t * (0.6931472f + t * (0.2402265f + t * (0.05550411f + t * (0.009618129f + t * 0.00133336f))));
    int32_t bits = ((int32_t)whole + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return fraction * power;
}

/* Softmax of integer scores as codes 0..255 of each row's largest weight. scores: int32 [rows, columns], overwritten;
 * the score is scores * row[i] * column[j], to base 2; codes: int8, less 128; sums: of each row's weights before
 * rounding, on the codes' scale, NaN where a factor is. */
void ldmq_softmax_codes(int32_t *scores, const float *row, const float *column, int8_t *codes, float *sums,
                        int64_t rows, int64_t columns, int threads) {
    float poison = 0.0f;
    for (int64_t j = 0; j < columns; j++) poison += column[j] * 0.0f;
#pragma omp parallel for num_threads(threads) if (rows * columns > WORTH_THREADS)
    for (int64_t i = 0; i < rows; i++) {
        int32_t *s = scores + i * columns;
        int8_t *out = codes + i * columns;
        float most = -INFINITY, total = 0.0f, factor = row[i];
#pragma omp simd reduction(max : most)
        for (int64_t j = 0; j < columns; j++) {
            float v = (float)s[j] * column[j];
            memcpy(s + j, &v, 4);
            most = v > most ? v : most;
        }
#pragma omp simd reduction(+ : total)
        for (int64_t j = 0; j < columns; j++) {
            float v;
            memcpy(&v, s + j, 4);
            float weight = power_of_two((v - most) * factor) * 255.0f;
            total += weight;
            out[j] = (int8_t)((int32_t)rintf(weight) - 128);
        }
        sums[i] = total + factor * 0.0f + poison;
    }
}
