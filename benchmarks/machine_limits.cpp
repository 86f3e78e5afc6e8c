// What one core of this machine can do: bytes read from memory and float32 operations per second.
#include <chrono>
#include <cstdint>

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
typedef float vf __attribute__((vector_size(kVectorBytes)));
typedef uint64_t vu __attribute__((vector_size(kVectorBytes), aligned(8)));

double now_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

// Seconds to sum all words of a buffer once, in streams that are far apart: memory is read faster so.
extern "C" double seconds_to_read(const void *buffer, int64_t bytes, uint64_t *sum) {
  constexpr int kStreams = 8;
  int64_t length = bytes / kVectorBytes / kStreams;
  const vu *streams[kStreams];
  vu sums[kStreams] = {};
  for (int s = 0; s < kStreams; ++s) streams[s] = (const vu *)buffer + s * length;
  double start_s = now_s();
  for (int64_t i = 0; i < length; ++i)
    for (int s = 0; s < kStreams; ++s) {
      __builtin_prefetch((const char *)(streams[s] + i) + 4096, 0, 2);
      sums[s] += streams[s][i];
    }
  double seconds = now_s() - start_s;
  vu total = {};
  for (int s = 0; s < kStreams; ++s) total += sums[s];
  *sum = total[0] + total[1];
  return seconds;
}

// Float32 operations per second of fused multiply-adds in registers; an addition and a
// multiplication count as two.
extern "C" double float32_operations_per_s(int64_t iterations, float *sum) {
  constexpr int kChains = 12;
  vf chains[kChains];
  for (int c = 0; c < kChains; ++c) chains[c] = vf{} + float(c);
  vf factor = vf{} + 0.999f, term = vf{} + 0.001f;
  double start_s = now_s();
  for (int64_t i = 0; i < iterations; ++i)
    for (int c = 0; c < kChains; ++c) chains[c] = chains[c] * factor + term;
  double seconds = now_s() - start_s;
  *sum = 0;
  for (int c = 0; c < kChains; ++c) *sum += chains[c][0];
  return double(iterations) * kChains * (kVectorBytes / 4) * 2 / seconds;
}
