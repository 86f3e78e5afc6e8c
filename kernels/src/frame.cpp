#include "frame.h"

#include <cmath>
#include <cstring>

#include "faasmoe_kernels.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "frames are little-endian");

namespace fk {
namespace {

constexpr uint32_t kMagic = 0x454f4d46;  // "FMOE"
constexpr uint8_t kVersion = 3;

template <class T>
T read(const uint8_t *bytes) {
  T value;
  std::memcpy(&value, bytes, sizeof value);
  return value;
}

template <class T>
void write(uint8_t *bytes, T value) {
  std::memcpy(bytes, &value, sizeof value);
}

// CRC-32 as in zlib, eight bytes at a time.
struct CrcTables {
  uint32_t t[8][256];
  CrcTables() {
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t crc = i;
      for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0);
      t[0][i] = crc;
    }
    for (uint32_t i = 0; i < 256; ++i)
      for (int k = 1; k < 8; ++k) t[k][i] = t[k - 1][i] >> 8 ^ t[0][t[k - 1][i] & 0xff];
  }
};
const CrcTables crc_tables;

// Continues a CRC-32; starts from 0xffffffff, and the result is its complement.
uint32_t crc32_update(uint32_t crc, const uint8_t *data, int64_t size) {
  const auto &t = crc_tables.t;
  for (; size >= 8; size -= 8, data += 8) {
    uint32_t low = read<uint32_t>(data) ^ crc, high = read<uint32_t>(data + 4);
    crc = t[7][low & 0xff] ^ t[6][low >> 8 & 0xff] ^ t[5][low >> 16 & 0xff] ^ t[4][low >> 24] ^
          t[3][high & 0xff] ^ t[2][high >> 8 & 0xff] ^ t[1][high >> 16 & 0xff] ^ t[0][high >> 24];
  }
  for (; size > 0; --size, ++data) crc = crc >> 8 ^ t[0][(crc ^ *data) & 0xff];
  return crc;
}

// Sum modulo 2^64 of little-endian 8-byte words, the last one padded with zeros.
uint64_t word_sum(const uint8_t *data, int64_t size) {
  uint64_t total = 0;
  int64_t n_words = size / 8;
  for (int64_t i = 0; i < n_words; ++i) total += read<uint64_t>(data + 8 * i);
  if (size % 8) {
    uint64_t last = 0;
    std::memcpy(&last, data + 8 * n_words, size_t(size % 8));
    total += last;
  }
  return total;
}

// `fields` are the 28 bytes before the checksum.
uint32_t checksum(const uint8_t *fields, const uint8_t *pairs, int64_t pairs_bytes, const uint8_t *rows,
                  int64_t rows_bytes) {
  uint32_t crc = crc32_update(0xffffffffu, fields, kChecksumOffset);
  crc = ~crc32_update(crc, pairs, pairs_bytes);
  uint64_t total = word_sum(rows, rows_bytes);
  return crc + uint32_t(total) + uint32_t(total >> 32);
}

// Checks the 32 header bytes, which are private to this process; `size_bytes` is the frame's.
const char *decode_header(const uint8_t *fields, int64_t size_bytes, uint8_t kind, FrameHeader *header) {
  if (read<uint32_t>(fields) != kMagic) return "magic";
  if (fields[4] != kVersion) return "version";
  if (fields[5] != kind) return "kind";
  if (read<uint16_t>(fields + 10) != 0) return "reserved";
  if (fields[6] < kBfloat16 || fields[6] > kFloat32) return "dtype";
  if (fields[7] > kUnreduced) return "mode";
  *header = {fields[5], fields[6], fields[7], read<uint16_t>(fields + 8), read<uint32_t>(fields + 12),
             read<uint32_t>(fields + 16), read<uint32_t>(fields + 20)};
  if (header->n_rows < 1) return "n_rows";
  if (header->n_pairs < 1) return "n_pairs";
  if (header->hidden_size < 1) return "hidden_size";
  __extension__ using Wide = unsigned __int128;  // products of fields overflow 64 bits
  int64_t row_bytes = header->row_bytes();
  Wide n_vectors = kind == kResponse && header->mode == kUnreduced ? header->n_pairs : header->n_rows;
  int64_t payload_bytes = read<uint32_t>(fields + 24);
  if (n_vectors * Wide(row_bytes) + Wide(header->pairs_bytes()) != Wide(payload_bytes)) return "payload_bytes";
  int64_t limit = header->mode == kUnreduced ? kMaxFrameBytes - kFrameHeaderBytes : kMaxPairsBytes;
  bool gathers = kind == kRequest || header->mode == kUnreduced;  // a row per pair
  if (gathers && int64_t(header->n_pairs) > limit / row_bytes) return "n_pairs";
  return size_bytes == kFrameHeaderBytes + payload_bytes ? nullptr : "frame";
}

const char *check_pairs(const FrameRequest &request) {
  int32_t previous = 0;
  int64_t n_rows = request.header.n_rows;
  for (uint32_t i = 0; i < request.header.n_pairs; ++i) {
    int32_t row = request.pair_row[i];
    if (row < previous || row >= n_rows) return "pair_row";
    previous = row;
  }
  for (uint32_t i = 0; i < request.header.n_pairs; ++i)
    if (request.pair_expert[i] < 0) return "pair_expert";
  for (uint32_t i = 0; i < request.header.n_pairs; ++i)
    if (!std::isfinite(request.pair_weight[i])) return "pair_weight";
  return nullptr;
}

}  // namespace

FrameHeader response_header(const FrameHeader &request) {
  FrameHeader header = request;
  header.kind = kResponse;
  if (header.mode == kReduced) header.dtype = kFloat32;
  return header;
}

FrameHeader response_header(const FrameHeader &request, int64_t n_vectors) {
  FrameHeader header = response_header(request);
  header.n_rows = uint32_t(n_vectors);
  return header;
}

void write_fields(uint8_t *frame, const FrameHeader &header) {
  write(frame, kMagic);
  frame[4] = kVersion;
  frame[5] = header.kind;
  frame[6] = header.dtype;
  frame[7] = header.mode;
  write(frame + 8, header.layer);
  write(frame + 10, uint16_t(0));
  write(frame + 12, header.n_rows);
  write(frame + 16, header.n_pairs);
  write(frame + 20, header.hidden_size);
  write(frame + 24, uint32_t(header.payload_bytes()));
}

void write_checksum(uint8_t *frame, const FrameHeader &header) {
  int64_t pairs_bytes = header.pairs_bytes();
  const uint8_t *pairs = frame + kFrameHeaderBytes;
  write(frame + kChecksumOffset,
        checksum(frame, pairs, pairs_bytes, pairs + pairs_bytes, header.payload_bytes() - pairs_bytes));
}

const char *decode_request(const uint8_t *frame, int64_t size_bytes, FrameRequest *request) {
  if (size_bytes < kFrameHeaderBytes || size_bytes > kMaxFrameBytes) return "frame";
  auto &head = request->head;
  head.assign(frame, frame + kFrameHeaderBytes);
  if (const char *field = decode_header(head.data(), size_bytes, kRequest, &request->header)) return field;
  int64_t pairs_bytes = request->header.pairs_bytes(), n_pairs = request->header.n_pairs;
  request->rows = frame + kFrameHeaderBytes + pairs_bytes;
  head.insert(head.end(), frame + kFrameHeaderBytes, request->rows);
  const uint8_t *pairs = head.data() + kFrameHeaderBytes;
  uint32_t expected = checksum(head.data(), pairs, pairs_bytes, request->rows,
                               request->header.payload_bytes() - pairs_bytes);
  if (read<uint32_t>(head.data() + kChecksumOffset) != expected) return "checksum";
  request->pair_row = reinterpret_cast<const int32_t *>(pairs);
  request->pair_expert = request->pair_row + n_pairs;
  request->pair_weight = reinterpret_cast<const float *>(request->pair_expert + n_pairs);
  return check_pairs(*request);
}

const char *check_response(const uint8_t *frame, int64_t size_bytes, const FrameHeader &expected) {
  if (size_bytes != expected.frame_bytes()) return "frame";
  uint8_t fields[kFrameHeaderBytes], wanted[kFrameHeaderBytes];
  std::memcpy(fields, frame, sizeof fields);
  write_fields(wanted, expected);
  if (std::memcmp(fields, wanted, kChecksumOffset)) {
    FrameHeader header;
    const char *field = decode_header(fields, size_bytes, kResponse, &header);
    return field ? field : "header";
  }
  const uint8_t *rows = frame + kFrameHeaderBytes;
  uint32_t sum = checksum(fields, rows, 0, rows, expected.payload_bytes());
  return read<uint32_t>(fields + kChecksumOffset) == sum ? nullptr : "checksum";
}

}  // namespace fk

extern "C" {

// For tests: the field of a frame that is invalid, or NULL.
__attribute__((visibility("default"))) const char *fk_check_request_frame(const uint8_t *frame,
                                                                          int64_t size_bytes) {
  fk::FrameRequest request;
  return fk::decode_request(frame, size_bytes, &request);
}

// For tests: the field of the response to the request frame that is invalid, or NULL.
__attribute__((visibility("default"))) const char *fk_check_response_frame(const uint8_t *frame,
                                                                           int64_t size_bytes,
                                                                           const uint8_t *request_frame,
                                                                           int64_t request_bytes) {
  fk::FrameRequest request;
  if (const char *field = fk::decode_request(request_frame, request_bytes, &request)) return field;
  return fk::check_response(frame, size_bytes, fk::response_header(request.header));
}

}  // extern "C"
