/* CPU kernels of the native engine, float32, one thread.
 *
 * Every kernel computes a row (a token) in one fixed order that does not depend on which other rows
 * share the call: a token's result is the same bits alone or in a batch, in one chunk or in many.
 * That is why the build uses no -ffast-math, and why masked terms are exact zeros.
 *
 * Shapes are C-contiguous unless a stride is passed; strides count floats.
 */
#define _GNU_SOURCE
#include <math.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#if defined(__linux__)
#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__AVX512F__)
#include <immintrin.h>
#define VL 16 /* floats in a vector */
#define NV 4  /* vectors in a register tile */
#elif defined(__AVX__)
#include <immintrin.h>
#define VL 8
#define NV 2
#elif defined(__aarch64__)
#define VL 4
#define NV 4
#else
#define VL 4
#define NV 2
#endif
#define MR 6         /* rows of a register tile: MR * NV accumulators */
#define NR (VL * NV) /* columns of a register tile */
#define ROW_BLOCK 96 /* rows that meet one weight panel before the next: their inputs stay in L2 */
#define KEYS 128     /* keys of an attention tile; a multiple of NR */
#define MAX_HEAD_DIM 256
#define LOG2_E 1.44269504088896f

typedef float vec __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(VL * 4), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))
#define API __attribute__((visibility("default")))
#define UNROLL _Pragma("GCC unroll 16")

INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE void store(float *p, vec v) { *(vec *)p = v; }
INLINE vec splat(float x) { return x - (vec){0}; }
INLINE long min_l(long a, long b) { return a < b ? a : b; }
INLINE long max_l(long a, long b) { return a > b ? a : b; }

INLINE float sum(vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float s = 0;
  for (int i = 0; i < VL; i++) s += v[i];
  return s;
#endif
}

INLINE vec vmax(vec a, vec b) {
#if defined(__AVX512F__)
  return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
  ivec take = a > b;
  return (vec)(((ivec)a & take) | ((ivec)b & ~take));
#endif
}

INLINE float max_lane(vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float m = v[0];
  for (int i = 1; i < VL; i++) m = v[i] > m ? v[i] : m;
  return m;
#endif
}

/* 2^x for x <= 127, exactly 0 below -126. Polynomial of Cephes exp2f, error below 2 ulp. */
INLINE vec exp2_vec(vec x) {
  const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer in the low bits */
  ivec zero = x < -126.0f;
  vec shifted = x + magic;
  vec f = x - (shifted - magic);
  vec p = splat(1.535336188319500e-4f);
  p = p * f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  p = p * f + 1.0f;
  return (vec)(((ivec)p + ((ivec)shifted << 23)) & ~zero);
}

static int64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Called between tiles of long kernels: lets others have the core every YIELD_NS. Linux ends time
 * slices at ticks only, 1 to 10 ms apart; a process that needs a few microseconds of this core, the
 * front door with a token to relay, would wait that long behind a prefill. Costs nothing where
 * nobody waits. */
#define YIELD_NS 200000
static __thread int64_t yielded_ns;
static void give_way(void) {
  if (now_ns() - yielded_ns < YIELD_NS) return;
  sched_yield();
  yielded_ns = now_ns();
}

/* ---- GEMM: out[M, N] = x[M, K] @ w[N, K]^T + bias, w packed in panels of NR columns ---- */

API long pd_panel_width(void) { return NR; }

/* packed[ceil(N / NR)][K][NR] from w[N, K], zero-padded. */
API void pd_pack(const float *w, long N, long K, float *packed) {
  for (long n0 = 0; n0 < N; n0 += NR) {
    float *panel = packed + n0 * K;
    long cols = min_l(NR, N - n0);
    for (long j = 0; j < NR; j++)
      for (long k = 0; k < K; k++) panel[k * NR + j] = j < cols ? w[(n0 + j) * K + k] : 0.0f;
  }
}

INLINE void gemm_tile(const int mr, const float *x, long ldx, const float *panel, long K,
                      const float *bias, float *out, long ldo, long cols) {
  vec acc[MR][NV];
  UNROLL for (int i = 0; i < mr; i++) UNROLL for (int v = 0; v < NV; v++) acc[i][v] = (vec){0};
  for (long k = 0; k < K; k++) {
    vec w[NV];
    UNROLL for (int v = 0; v < NV; v++) w[v] = load(panel + k * NR + v * VL);
    UNROLL for (int i = 0; i < mr; i++) {
      vec xi = splat(x[i * ldx + k]);
      UNROLL for (int v = 0; v < NV; v++) acc[i][v] += xi * w[v];
    }
  }
  if (bias && cols == NR)
    UNROLL for (int i = 0; i < mr; i++) UNROLL for (int v = 0; v < NV; v++)
        acc[i][v] += load(bias + v * VL);
  if (cols == NR) {
    UNROLL for (int i = 0; i < mr; i++) UNROLL for (int v = 0; v < NV; v++)
        store(out + i * ldo + v * VL, acc[i][v]);
    return;
  }
  float row[NR];
  UNROLL for (int i = 0; i < mr; i++) {
    UNROLL for (int v = 0; v < NV; v++) store(row + v * VL, acc[i][v]);
    for (long j = 0; j < cols; j++) out[i * ldo + j] = bias ? row[j] + bias[j] : row[j];
  }
}

API void pd_linear(const float *x, const float *packed, const float *bias, float *out, long M,
                   long N, long K) {
  for (long m0 = 0; m0 < M; m0 += ROW_BLOCK) {
    long m1 = min_l(M, m0 + ROW_BLOCK);
    for (long n0 = 0; n0 < N; n0 += NR) {
      const float *panel = packed + n0 * K, *b = bias ? bias + n0 : 0;
      long cols = min_l(NR, N - n0);
      give_way();
      for (long m = m0; m < m1; m += MR) {
        const float *xm = x + m * K;
        float *o = out + m * N + n0;
        switch (m1 - m) {
          case 1: gemm_tile(1, xm, K, panel, K, b, o, N, cols); break;
          case 2: gemm_tile(2, xm, K, panel, K, b, o, N, cols); break;
          case 3: gemm_tile(3, xm, K, panel, K, b, o, N, cols); break;
          case 4: gemm_tile(4, xm, K, panel, K, b, o, N, cols); break;
          case 5: gemm_tile(5, xm, K, panel, K, b, o, N, cols); break;
          default: gemm_tile(MR, xm, K, panel, K, b, o, N, cols);
        }
      }
    }
  }
}

/* ---- elementwise ---- */

INLINE float mean_square(const float *x, long n) {
  vec acc = {0};
  long i = 0;
  for (; i + VL <= n; i += VL) acc += load(x + i) * load(x + i);
  float s = sum(acc);
  for (; i < n; i++) s += x[i] * x[i];
  return s / (float)n;
}

/* residual[M, N] += x (x may be null); out = residual / rms(residual) * weight. */
API void pd_add_rms_norm(const float *x, float *residual, const float *weight, float *out, long M,
                         long N, float eps) {
  for (long m = 0; m < M; m++) {
    float *r = residual + m * N, *o = out + m * N;
    if (x)
      for (long i = 0; i < N; i++) r[i] += x[m * N + i];
    float scale = 1.0f / sqrtf(mean_square(r, N) + eps);
    for (long i = 0; i < N; i++) o[i] = r[i] * scale * weight[i];
  }
}

/* out[M, N] = silu(gate_up[M, :N]) * gate_up[M, N:]. */
API void pd_silu_mul(const float *gate_up, float *out, long M, long N) {
  for (long m = 0; m < M; m++) {
    const float *g = gate_up + m * 2 * N, *u = g + N;
    float *o = out + m * N;
    long i = 0;
    for (; i + VL <= N; i += VL) {
      vec x = load(g + i), e = exp2_vec(-vmax(x * LOG2_E, splat(-126.0f)));
      store(o + i, x / (1.0f + e) * load(u + i));
    }
    for (; i < N; i++) o[i] = g[i] / (1.0f + expf(-g[i])) * u[i];
  }
}

INLINE void rope_head(float *x, float *out, const float *norm, float eps, const float *table, long D) {
  long half = D / 2;
  const float *c = table, *s = table + half;
  if (norm) {
    float scale = 1.0f / sqrtf(mean_square(x, D) + eps);
    for (long i = 0; i < D; i++) x[i] = x[i] * scale * norm[i];
  }
  for (long i = 0; i < half; i++) {
    float a = x[i], b = x[half + i];
    out[i] = a * c[i] - b * s[i];
    out[half + i] = b * c[i] + a * s[i];
  }
}

/* Rotates the queries of qkv[T, (Hq + 2 * Hkv) * D] in place; rotates the keys and stores them and
 * the values into the layer's pages kv[block][2][block_size][Hkv][D] at slots[T]. table[position] is
 * D / 2 cosines, then D / 2 sines. q_norm and k_norm [D] may be null. */
API void pd_rope_write_kv(float *qkv, const int64_t *positions, const int64_t *slots,
                          const float *table, const float *q_norm, const float *k_norm, float eps,
                          float *kv, long T, long Hq, long Hkv, long D, long block_size) {
  long kv_row = Hkv * D;
  for (long t = 0; t < T; t++) {
    float *q = qkv + t * (Hq + 2 * Hkv) * D, *k = q + Hq * D, *v = k + kv_row;
    const float *row = table + positions[t] * D;
    long block = slots[t] / block_size, offset = slots[t] % block_size;
    float *page_k = kv + (block * 2 * block_size + offset) * kv_row;
    for (long h = 0; h < Hq; h++) rope_head(q + h * D, q + h * D, q_norm, eps, row, D);
    for (long h = 0; h < Hkv; h++) rope_head(k + h * D, page_k + h * D, k_norm, eps, row, D);
    memcpy(page_k + block_size * kv_row, v, kv_row * sizeof(float));
  }
}

/* ---- paged causal attention with online softmax (Dao et al., FlashAttention) ---- */

typedef struct {
  const float *kv; /* one layer of the pool */
  const int32_t *table;
  const float *q; /* [length, Hq, D], row stride q_stride */
  float *out;     /* [length, Hq, D] */
  long q_stride, length, context, block_size, Hq, Hkv, D;
  float scale; /* softmax scale * log2(e) */
} attention;

/* One tile of keys. rows[j] is key j's row [Hkv, D] in its page, its value lies value_offset behind;
 * next[j] are the rows of the tile to come. For one KV head at a time: k[KEYS / NR][D][NR], a
 * transposed copy, zero behind the last key, and v[KEYS][D], a plain copy that is made where many
 * query rows use it. */
typedef struct {
  const float *rows[KEYS], *next[KEYS];
  long num_keys, value_offset;
  float *k, *v;
} tile;

#if defined(__AVX512F__)
INLINE void transpose_16(const float *const *rows, long column, long n, float *dst) {
  __m512 a[16], b[16];
  UNROLL for (int i = 0; i < 16; i++)
      a[i] = i < n ? _mm512_loadu_ps(rows[i] + column) : _mm512_setzero_ps();
  UNROLL for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  UNROLL for (int i = 0; i < 16; i += 4) UNROLL for (int j = 0; j < 2; j++) {
    __m512d x = _mm512_castps_pd(b[i + j]), y = _mm512_castps_pd(b[i + 2 + j]);
    a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
    a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
  }
  UNROLL for (int j = 0; j < 4; j++) {
    b[j] = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x88);
    b[4 + j] = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xdd);
    b[8 + j] = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x88);
    b[12 + j] = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xdd);
  }
  UNROLL for (int j = 0; j < 4; j++) {
    _mm512_storeu_ps(dst + (j)*NR, _mm512_shuffle_f32x4(b[j], b[8 + j], 0x88));
    _mm512_storeu_ps(dst + (8 + j) * NR, _mm512_shuffle_f32x4(b[j], b[8 + j], 0xdd));
    _mm512_storeu_ps(dst + (4 + j) * NR, _mm512_shuffle_f32x4(b[4 + j], b[12 + j], 0x88));
    _mm512_storeu_ps(dst + (12 + j) * NR, _mm512_shuffle_f32x4(b[4 + j], b[12 + j], 0xdd));
  }
}
#elif defined(__AVX__)
INLINE void transpose_8(const float *const *rows, long column, long n, float *dst) {
  __m256 a[8], b[8];
  UNROLL for (int i = 0; i < 8; i++)
      a[i] = i < n ? _mm256_loadu_ps(rows[i] + column) : _mm256_setzero_ps();
  UNROLL for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  UNROLL for (int i = 0; i < 8; i += 4) UNROLL for (int j = 0; j < 2; j++) {
    a[i + 2 * j] = _mm256_shuffle_ps(b[i + j], b[i + 2 + j], 0x44);
    a[i + 2 * j + 1] = _mm256_shuffle_ps(b[i + j], b[i + 2 + j], 0xee);
  }
  UNROLL for (int j = 0; j < 4; j++) {
    _mm256_storeu_ps(dst + j * NR, _mm256_permute2f128_ps(a[j], a[4 + j], 0x20));
    _mm256_storeu_ps(dst + (4 + j) * NR, _mm256_permute2f128_ps(a[j], a[4 + j], 0x31));
  }
}
#endif

static void locate(const attention *a, long k0, long n, const float **rows) {
  long row = a->Hkv * a->D, bs = a->block_size, index = k0 / bs, offset = k0 % bs;
  for (long j = 0; j < n; j++) {
    rows[j] = a->kv + ((long)a->table[index] * 2 * bs + offset) * row;
    if (++offset == bs) offset = 0, index++;
  }
}

/* `direct` (one query): values are read from the pages, so only keys are copied; and as a tile is
 * used once a head, the same places of the next tile are asked for meanwhile: pages lie scattered,
 * the hardware does not foresee them. */
INLINE void pack_tile(const int direct, const attention *a, long h, tile *t) {
  long D = a->D, n = t->num_keys, used = (n + NR - 1) / NR * NR;
  if (!direct)
    for (long j = 0; j < n; j++)
      for (long d = 0; d < D; d += VL)
        store(t->v + j * D + d, load(t->rows[j] + t->value_offset + h * D + d));
  for (long j = 0; j < used; j += VL) {
    float *dst = t->k + j / NR * NR * D + j % NR;
    for (long d = 0; d < D; d += VL) {
#if defined(__AVX512F__)
      transpose_16(t->rows + j, h * D + d, n - j, dst + d * NR);
#elif defined(__AVX__)
      transpose_8(t->rows + j, h * D + d, n - j, dst + d * NR);
#else
      for (long i = 0; i < VL; i++)
        for (long c = d; c < d + VL; c++)
          dst[c * NR + i] = j + i < n ? t->rows[j + i][h * D + c] : 0.0f;
#endif
      if (direct)
        UNROLL for (int i = 0; i < VL; i++) __builtin_prefetch(t->next[j + i] + h * D + d, 0, 2);
    }
  }
}

/* out = out * alpha + p @ values over `limit` keys, for nv vectors of head h from column d on. */
INLINE void weigh_values(const int mr, const int nv, const int direct, float p[MR][KEYS],
                         const float *alpha, const tile *t, long h, long D, long d, long limit,
                         float *const *out) {
  vec acc[MR][NV];
  UNROLL for (int i = 0; i < mr; i++) UNROLL for (int c = 0; c < nv; c++)
      acc[i][c] = load(out[i] + d + c * VL) * splat(alpha[i]);
  for (long k = 0; k < limit; k++) {
    const float *value = direct ? t->rows[k] + t->value_offset + h * D + d : t->v + k * D + d;
    vec w[NV];
    UNROLL for (int c = 0; c < nv; c++) w[c] = load(value + c * VL);
    if (direct)
      UNROLL for (int c = 0; c < nv; c++)
          __builtin_prefetch(t->next[k] + t->value_offset + h * D + d + c * VL, 0, 2);
    UNROLL for (int i = 0; i < mr; i++) {
      vec pi = splat(p[i][k]);
      UNROLL for (int c = 0; c < nv; c++) acc[i][c] += pi * w[c];
    }
  }
  UNROLL for (int i = 0; i < mr; i++) UNROLL for (int c = 0; c < nv; c++)
      store(out[i] + d + c * VL, acc[i][c]);
}

/* Query rows r .. r + mr of KV head h (row = token * group + head in group) against one tile. */
INLINE void attend_rows(const int mr, const int direct, const attention *a, long h, long k0,
                        long r, const tile *t, float *m, float *l) {
  long D = a->D, group = a->Hq / a->Hkv;
  const float *q[MR];
  float *out[MR], alpha[MR], p[MR][KEYS] __attribute__((aligned(64)));
  long visible[MR];
  UNROLL for (int i = 0; i < mr; i++) {
    long token = (r + i) / group, head = h * group + (r + i) % group;
    q[i] = a->q + token * a->q_stride + head * D;
    out[i] = a->out + (token * a->Hq + head) * D;
    visible[i] = min_l(t->num_keys, a->context + token - k0 + 1);
  }
  long limit = visible[mr - 1], padded = (limit + NR - 1) / NR * NR;
  for (long j = 0; j < padded; j += NR) {
    const float *panel = t->k + j * D;
    vec acc[MR][NV];
    UNROLL for (int i = 0; i < mr; i++) UNROLL for (int v = 0; v < NV; v++) acc[i][v] = (vec){0};
    for (long d = 0; d < D; d++) {
      vec w[NV];
      UNROLL for (int v = 0; v < NV; v++) w[v] = load(panel + d * NR + v * VL);
      UNROLL for (int i = 0; i < mr; i++) {
        vec qi = splat(q[i][d]);
        UNROLL for (int v = 0; v < NV; v++) acc[i][v] += qi * w[v];
      }
    }
    UNROLL for (int i = 0; i < mr; i++) UNROLL for (int v = 0; v < NV; v++)
        store(&p[i][j + v * VL], acc[i][v]);
  }
  UNROLL for (int i = 0; i < mr; i++) {
    for (long j = visible[i]; j < padded; j++) p[i][j] = -1e30f;
    vec top = load(p[i]);
    for (long j = VL; j < padded; j += VL) top = vmax(top, load(&p[i][j]));
    float highest = max_lane(top) * a->scale, m_new = highest > m[r + i] ? highest : m[r + i];
    alpha[i] = exp2_vec(splat(m[r + i] - m_new))[0];
    vec total = {0};
    for (long j = 0; j < padded; j += VL) {
      vec e = exp2_vec(load(&p[i][j]) * splat(a->scale) - splat(m_new));
      store(&p[i][j], e);
      total += e;
    }
    m[r + i] = m_new;
    l[r + i] = l[r + i] * alpha[i] + sum(total);
  }
  long d = 0;
  for (; d + NR <= D; d += NR) weigh_values(mr, NV, direct, p, alpha, t, h, D, d, limit, out);
  for (; d + 2 * VL <= D; d += 2 * VL) weigh_values(mr, 2, direct, p, alpha, t, h, D, d, limit, out);
  for (; d < D; d += VL) weigh_values(mr, 1, direct, p, alpha, t, h, D, d, limit, out);
}

INLINE void attend_tile(const int direct, const attention *a, long h, long k0, tile *t, float *m,
                        float *l) {
  long group = a->Hq / a->Hkv, rows = a->length * group;
  pack_tile(direct, a, h, t);
  for (long r = max_l(0, k0 - a->context) * group, n = 0; r < rows; r += MR, n++) {
    if (n % 16 == 0) give_way();
    switch (rows - r) {
      case 1: attend_rows(1, direct, a, h, k0, r, t, m, l); break;
      case 2: attend_rows(2, direct, a, h, k0, r, t, m, l); break;
      case 3: attend_rows(3, direct, a, h, k0, r, t, m, l); break;
      case 4: attend_rows(4, direct, a, h, k0, r, t, m, l); break;
      case 5: attend_rows(5, direct, a, h, k0, r, t, m, l); break;
      default: attend_rows(MR, direct, a, h, k0, r, t, m, l);
    }
  }
}

/* One query: all heads of a tile together, so that pages stream once. */
static void attend_one(const attention *a, tile *t, float *m, float *l) {
  long group = a->Hq / a->Hkv, num_keys = a->context + 1, n = min_l(KEYS, num_keys);
  locate(a, 0, n, t->next);
  for (long k0 = 0; k0 < num_keys; k0 += KEYS) {
    t->num_keys = n;
    memcpy(t->rows, t->next, n * sizeof *t->rows);
    n = max_l(0, min_l(KEYS, num_keys - k0 - KEYS));
    locate(a, k0 + KEYS, n, t->next);
    for (long j = n; j < KEYS; j++) t->next[j] = t->rows[0];
    for (long h = 0; h < a->Hkv; h++) attend_tile(1, a, h, k0, t, m + h * group, l + h * group);
  }
}

/* Many queries: head by head, so that a head's output rows stay in cache from tile to tile. */
static void attend_many(const attention *a, tile *t, float *m, float *l) {
  long rows = a->length * a->Hq / a->Hkv, num_keys = a->context + a->length;
  for (long h = 0; h < a->Hkv; h++)
    for (long k0 = 0; k0 < num_keys; k0 += KEYS) {
      t->num_keys = min_l(KEYS, num_keys - k0);
      locate(a, k0, t->num_keys, t->rows);
      attend_tile(0, a, h, k0, t, m + h * rows, l + h * rows);
    }
}

/* m and l hold length * Hq floats. */
static void attend(const attention *a, tile *t, float *m, float *l) {
  long group = a->Hq / a->Hkv, rows = a->length * group, D = a->D;
  memset(a->out, 0, a->length * a->Hq * D * sizeof(float));
  for (long i = 0; i < rows * a->Hkv; i++) m[i] = -1e30f, l[i] = 0.0f;
  t->value_offset = a->block_size * a->Hkv * D;
  if (a->length == 1)
    attend_one(a, t, m, l);
  else
    attend_many(a, t, m, l);
  for (long h = 0; h < a->Hkv; h++)
    for (long r = 0; r < rows; r++) {
      float *o = a->out + (r / group * a->Hq + h * group + r % group) * D;
      float scale = 1.0f / l[h * rows + r];
      for (long d = 0; d < D; d++) o[d] *= scale;
    }
}

API long pd_max_head_dim(void) { return MAX_HEAD_DIM; }
API long pd_vector_width(void) { return VL; }

/* Scratch of a call: the tile's copies, then m and l. Null without memory. */
static float *make_scratch(tile *t, long rows, long D) {
  float *scratch = aligned_alloc(64, (2 * (KEYS * D + rows) * sizeof(float) + 63) / 64 * 64);
  t->k = scratch, t->v = scratch + KEYS * D;
  return scratch;
}

/* Queries q[length, Hq, D] at positions context .., against the pages in table. 0, or -1: no memory. */
API int pd_attend_prefill(const float *q, float *out, const float *kv, const int32_t *table,
                          long length, long context, long q_stride, long block_size, long Hq,
                          long Hkv, long D, float scale) {
  tile t;
  float *scratch = make_scratch(&t, length * Hq, D), *m = t.v + KEYS * D;
  if (!scratch) return -1;
  attention a = {kv, table, q, out, q_stride, length, context, block_size, Hq, Hkv, D,
                 scale * LOG2_E};
  attend(&a, &t, m, m + length * Hq);
  free(scratch);
  return 0;
}

/* One query a row: q[B, Hq, D], tables[B, width], seq_lens[B] tokens attended to. */
API int pd_attend_decode(const float *q, float *out, const float *kv, const int32_t *tables,
                         const int32_t *seq_lens, long B, long width, long q_stride,
                         long block_size, long Hq, long Hkv, long D, float scale) {
  tile t;
  float *scratch = make_scratch(&t, Hq, D), *m = t.v + KEYS * D;
  if (!scratch) return -1;
  for (long b = 0; b < B; b++) {
    attention a = {kv, tables + b * width, q + b * q_stride, out + b * Hq * D, q_stride, 1,
                   seq_lens[b] - 1, block_size, Hq, Hkv, D, scale * LOG2_E};
    attend(&a, &t, m, m + Hq);
  }
  free(scratch);
  return 0;
}

/* ---- all-reduce between ranks of one host, through shared memory ----
 *
 * shared: one header line a rank (sequence number, waiter word), then two slots of slot_floats a
 * rank. Rank r stores its part into slot [sequence & 1][r], publishes the sequence number, waits for
 * the others', and adds all parts in rank order: every rank gets the same bits. A slot is written
 * again two sequences later; by then its writer has seen every peer publish the one in between,
 * which peers do only after they have read it.
 */
#define LINE_WORDS 16 /* uint32 words of a header line: 64 bytes */
#define SPINS 2000

INLINE void relax(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

static void publish(uint32_t *word, uint32_t value) {
  __atomic_store_n(word, value, __ATOMIC_SEQ_CST);
#if defined(__linux__)
  if (__atomic_load_n(word + 1, __ATOMIC_SEQ_CST))
    syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, 0, 0, 0);
#endif
}

/* 0 once *word has reached `value`, -1 at the deadline. */
static int await(uint32_t *word, uint32_t value, int64_t deadline) {
  for (int i = 0; i < SPINS; i++) {
    if ((int32_t)(__atomic_load_n(word, __ATOMIC_ACQUIRE) - value) >= 0) return 0;
    relax();
  }
  for (;;) {
    int64_t left = deadline - now_ns();
    if (left <= 0) return -1;
#if defined(__linux__)
    struct timespec wait = {left / 1000000000, left % 1000000000};
    __atomic_fetch_add(word + 1, 1, __ATOMIC_SEQ_CST);
    uint32_t seen = __atomic_load_n(word, __ATOMIC_SEQ_CST);
    if ((int32_t)(seen - value) < 0) syscall(SYS_futex, word, FUTEX_WAIT, seen, &wait, 0, 0);
    __atomic_fetch_sub(word + 1, 1, __ATOMIC_SEQ_CST);
#else
    sched_yield();
#endif
    if ((int32_t)(__atomic_load_n(word, __ATOMIC_ACQUIRE) - value) >= 0) return 0;
  }
}

/* x[n] becomes the sum over ranks; n <= slot_floats. `sequence` counts calls from 1, mod 2^32. */
API int pd_all_reduce(float *x, long n, long rank, long world, void *shared, long sequence,
                      long timeout_ms) {
  uint32_t *lines = shared;
  long slot_floats = lines[world * LINE_WORDS];
  float *slots = (float *)(lines + (world + 1) * LINE_WORDS) + (sequence & 1) * world * slot_floats;
  int64_t deadline = now_ns() + (int64_t)timeout_ms * 1000000;
  memcpy(slots + rank * slot_floats, x, n * sizeof(float));
  publish(lines + rank * LINE_WORDS, (uint32_t)sequence);
  for (long r = 0; r < world; r++)
    if (r != rank && await(lines + r * LINE_WORDS, (uint32_t)sequence, deadline)) return -1;
  for (long i = 0; i < n; i++) x[i] = slots[i];
  for (long r = 1; r < world; r++) {
    const float *part = slots + r * slot_floats;
    for (long i = 0; i < n; i++) x[i] += part[i];
  }
  return 0;
}
