// Some weight rows that are multiplied together; a part of kernels_impl.h.

constexpr int kCacheLineBytes = 64;

// Weight rows, and where to prefetch: `ahead` bytes behind what is read; past a row's end, in the
// row that is read next, `skip` bytes further.
template <int C>
struct Panel {
  const uint8_t *codes[C];
  const float *scales[C];
  int64_t ahead = 0, row_bytes = 0, skip = 0;

  // For kBytes at an offset of each row.
  template <int kBytes>
  inline __attribute__((always_inline)) void prefetch(int64_t offset) const {
    if (ahead == 0 || (kBytes < kCacheLineBytes && offset % kCacheLineBytes >= kBytes)) return;
    int64_t target = offset + ahead;
    if (target >= row_bytes) target += skip;
    for (int c = 0; c < C; ++c)
      for (int line = 0; line < kBytes || line == 0; line += kCacheLineBytes)
        __builtin_prefetch(codes[c] + target + line, 0, 2);
  }
};
