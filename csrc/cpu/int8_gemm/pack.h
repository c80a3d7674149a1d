// From weights of any strides to panels.
#include "cpu/int8_gemm/tile.h"

namespace qkernels::QK_NAMESPACE {
namespace {

#if QK_PATH != QK_PATH_SCALAR
// How far ahead b is prefetched, in rows and in bytes. It is read in more streams than hardware prefetchers follow.
constexpr int64_t kRowsAhead = 16, kBytesAhead = 256;

inline void keep_group(const __m256i codes, int8_t* out, __m256i& total) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), codes);
  total = add_groups(total, codes);
}

// Reads 8 times 4 codes along k for each of 8 channels, and writes them so that the channels of each 4 k follow each
// other.
inline void transpose_groups(const int8_t* b, int64_t stride_n, int8_t* out, __m256i& total) {
  __m256i r[8], t[8];
#pragma GCC unroll 8
  for (int c = 0; c < 8; ++c) r[c] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + c * stride_n));
#pragma GCC unroll 4
  for (int c = 0; c < 8; c += 2) {
    t[c] = _mm256_unpacklo_epi32(r[c], r[c + 1]);
    t[c + 1] = _mm256_unpackhi_epi32(r[c], r[c + 1]);
  }
#pragma GCC unroll 2
  for (int c = 0; c < 8; c += 4) {
    r[c] = _mm256_unpacklo_epi64(t[c], t[c + 2]);
    r[c + 1] = _mm256_unpackhi_epi64(t[c], t[c + 2]);
    r[c + 2] = _mm256_unpacklo_epi64(t[c + 1], t[c + 3]);
    r[c + 3] = _mm256_unpackhi_epi64(t[c + 1], t[c + 3]);
  }
#pragma GCC unroll 4
  for (int g = 0; g < 4; ++g) {
    keep_group(_mm256_permute2x128_si256(r[g], r[g + 4], 0x20), out + g * kPanel * 4, total);
    keep_group(_mm256_permute2x128_si256(r[g], r[g + 4], 0x31), out + (g + 4) * kPanel * 4, total);
  }
}

// Reads 4 rows of 32 channels, and writes 4 codes along k for each channel.
inline void interleave_rows(const int8_t* b, int64_t stride_k, int8_t* out, __m256i (&total)[4]) {
  __m256i r[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) r[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + i * stride_k));
  const __m256i low01 = _mm256_unpacklo_epi8(r[0], r[1]), high01 = _mm256_unpackhi_epi8(r[0], r[1]);
  const __m256i low23 = _mm256_unpacklo_epi8(r[2], r[3]), high23 = _mm256_unpackhi_epi8(r[2], r[3]);
  const __m256i c0 = _mm256_unpacklo_epi16(low01, low23), c4 = _mm256_unpackhi_epi16(low01, low23);
  const __m256i c8 = _mm256_unpacklo_epi16(high01, high23), c12 = _mm256_unpackhi_epi16(high01, high23);
  keep_group(_mm256_permute2x128_si256(c0, c4, 0x20), out, total[0]);
  keep_group(_mm256_permute2x128_si256(c8, c12, 0x20), out + 32, total[1]);
  keep_group(_mm256_permute2x128_si256(c0, c4, 0x31), out + 64, total[2]);
  keep_group(_mm256_permute2x128_si256(c8, c12, 0x31), out + 96, total[3]);
}
// Packs full panels, up to the last k that whole vectors cover, and adds up their codes in totals[channel]. Returns how
// many k are done.
inline int64_t pack_fast(const int8_t* b, int64_t stride_n, int64_t stride_k, int64_t full, int64_t k, int8_t* data,
                         int32_t* totals) {
  int64_t done = 0;
  const int64_t bytes = panel_bytes(k);
  const auto keep = [&](const __m256i(&total)[4], int64_t panel) {
    for (int c = 0; c < 4; ++c)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(totals + panel * kPanel + c * 8), total[c]);
  };
  if (stride_k == 1) {
    for (int64_t panel = 0; panel < full; ++panel) {
      const int8_t* rows = b + panel * kPanel * stride_n;
      int8_t* out = data + panel * bytes;
      __m256i total[4] = {};
      // Reads whole cache lines at once: the lines of rows of 4096 bytes would evict each other before a second visit.
      for (done = 0; done + 64 <= k; done += 64)
        for (int c = 0; c < kPanel; c += 8) {
          for (int i = 0; i < 8 && done + kBytesAhead < k; ++i)
            _mm_prefetch(reinterpret_cast<const char*>(rows + (c + i) * stride_n + done + kBytesAhead), _MM_HINT_T1);
          transpose_groups(rows + c * stride_n + done, stride_n, out + done * kPanel + c * 4, total[c / 8]);
          transpose_groups(rows + c * stride_n + done + 32, stride_n, out + (done + 32) * kPanel + c * 4, total[c / 8]);
        }
      for (; done + 32 <= k; done += 32)
        for (int c = 0; c < kPanel; c += 8)
          transpose_groups(rows + c * stride_n + done, stride_n, out + done * kPanel + c * 4, total[c / 8]);
      keep(total, panel);
    }
  } else if (stride_n == 1) {
    __m256i total[kPackedPanels][4] = {};
    for (; done + 4 <= k; done += 4) {
      const int8_t* rows = b + done * stride_k;
      // Each row lies in another page, and hardware does not prefetch across pages.
      if (done + kRowsAhead + 4 <= k)
        for (int i = 0; i < 4; ++i)
          for (int64_t c = 0; c < full * kPanel; c += 64)
            _mm_prefetch(reinterpret_cast<const char*>(rows + (kRowsAhead + i) * stride_k + c), _MM_HINT_T0);
      for (int64_t panel = 0; panel < full; ++panel)
        interleave_rows(rows + panel * kPanel, stride_k, data + panel * bytes + done * kPanel, total[panel]);
    }
    for (int64_t panel = 0; panel < full; ++panel) keep(total[panel], panel);
  }
  return done;
}
#else
inline int64_t pack_fast(const int8_t*, int64_t, int64_t, int64_t, int64_t, int8_t*, int32_t*) { return 0; }
#endif

void pack_panels(const int8_t* b, int64_t stride_n, int64_t stride_k, int64_t channels, int64_t k, int8_t* data,
                 int32_t* colsum) {
  int32_t totals[kPackedPanels * kPanel] = {};
  const int64_t full = channels / kPanel, bytes = panel_bytes(k);
  const int64_t fast = full ? pack_fast(b, stride_n, stride_k, full, k, data, totals) : 0;
  for (int64_t panel = 0; panel < panels(channels); ++panel) {
    int8_t* out = data + panel * bytes;
    const int64_t done = panel < full ? fast : 0, last = std::min(channels, (panel + 1) * kPanel);
    if (bytes > done * kPanel) std::memset(out + done * kPanel, 0, static_cast<size_t>(bytes - done * kPanel));
    const auto pack = [&](int64_t i, int64_t c) {
      const int8_t code = b[i * stride_k + c * stride_n];
      out[((i / 4) * kPanel + c % kPanel) * 4 + (i & 3)] = code;
      totals[c] += code;
    };
    if (stride_k == 1)
      for (int64_t c = panel * kPanel; c < last; ++c)
        for (int64_t i = done; i < k; ++i) pack(i, c);
    else
      for (int64_t i = done; i < k; ++i)
        for (int64_t c = panel * kPanel; c < last; ++c) pack(i, c);
  }
  for (int64_t c = 0; c < channels; ++c) colsum[c] = totals[c];
}

}  // namespace
}  // namespace qkernels::QK_NAMESPACE
