// The frames of docs/wire.md: encoding, and decoding that checks every field.
#ifndef FAASMOE_FRAME_H
#define FAASMOE_FRAME_H

#include <stdint.h>

#include <vector>

namespace fk {

constexpr int64_t kFrameHeaderBytes = 32;
constexpr int64_t kChecksumOffset = 28;
constexpr int64_t kPairBytes = 12;  // row int32, expert int32, weight float32
constexpr int64_t kMaxFrameBytes = 8 << 20;
constexpr int64_t kMaxPairsBytes = 64 << 20;

enum FrameKind : uint8_t { kRequest = 1, kResponse = 2 };
enum FrameDtype : uint8_t { kBfloat16 = 1, kFloat16 = 2, kFloat32 = 3 };
enum FrameMode : uint8_t { kReduced = 0, kUnreduced = 1 };

struct FrameHeader {
  uint8_t kind, dtype, mode;
  uint16_t layer;
  uint32_t n_rows, n_pairs, hidden_size;

  int64_t row_bytes() const { return int64_t(hidden_size) * (dtype == kFloat32 ? 4 : 2); }
  int64_t pairs_bytes() const { return kind == kRequest ? int64_t(n_pairs) * kPairBytes : 0; }
  int64_t payload_bytes() const {
    if (kind == kRequest) return pairs_bytes() + int64_t(n_rows) * row_bytes();
    return row_bytes() * int64_t(mode == kUnreduced ? n_pairs : n_rows);
  }
  int64_t frame_bytes() const { return kFrameHeaderBytes + payload_bytes(); }
};

// A decoded request. Header and pairs are a private copy, as the sender may still write to `rows`.
struct FrameRequest {
  FrameHeader header;
  const int32_t *pair_row, *pair_expert;  // [n_pairs], in `head`
  const float *pair_weight;               // [n_pairs], in `head`
  const uint8_t *rows;                    // [n_rows, hidden_size] of the frame itself
  std::vector<uint8_t> head;              // reused from one request to the next
};

// The header's first 28 bytes.
void write_fields(uint8_t *frame, const FrameHeader &header);

// Fills in the checksum of a frame whose other bytes are complete.
void write_checksum(uint8_t *frame, const FrameHeader &header);

// Checks a request frame; returns the invalid field's name, or nullptr. Expert indices are only
// checked to be non-negative.
const char *decode_request(const uint8_t *frame, int64_t size_bytes, FrameRequest *request);

// Checks a response frame that must have the header `expected`, with the rows' sum; returns the invalid
// field, or nullptr.
const char *check_response(const uint8_t *frame, int64_t size_bytes, const FrameHeader &expected);

// The header of the response to a request of one function; sums are float32.
FrameHeader response_header(const FrameHeader &request);
// The same of a request of several functions: the sums of each, `n_vectors` rows in all.
FrameHeader response_header(const FrameHeader &request, int64_t n_vectors);

}  // namespace fk
#endif
