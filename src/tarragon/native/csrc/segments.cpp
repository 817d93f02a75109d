// tarragon::segment_write, segment_read: K,V rows into a checkpoint bucket and back (6.1).
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <cstdint>
#include <cstring>

#include "checks.h"
#include "crc32c.h"

namespace tarragon {
namespace {

using at::Tensor;
using at::TensorList;

constexpr uint32_t kAbsent = 0;  // the checksum of a row that was never written

uint32_t checksum_of(const uint8_t* row, int64_t size) {
  const uint32_t crc = crc32c(~0U, row, size);
  return crc == kAbsent ? 1 : crc;
}

struct Halves {
  uint8_t *key, *value;
  int64_t key_stride, value_stride, key_bytes, value_bytes;
};

// Bytes of one row of `rows`, [T, ...], whose inner dimensions must lie without gaps.
int64_t inner_bytes(const Tensor& rows) {
  int64_t size = static_cast<int64_t>(rows.element_size());
  for (int64_t d = rows.dim() - 1; d > 0; --d) {
    TORCH_CHECK_VALUE(rows.size(d) <= 1 || rows.stride(d) * static_cast<int64_t>(rows.element_size()) == size,
                      "key and value must have contiguous rows");
    size *= rows.size(d);
  }
  return size;
}

Halves halves(const Tensor& key, const Tensor& value, int64_t count, int64_t row_size) {
  for (const Tensor* half : {&key, &value}) {
    TORCH_CHECK_VALUE(half->dim() >= 2 && half->size(0) >= count, "key and value must have one row for each slot");
  }
  const int64_t key_bytes = inner_bytes(key), value_bytes = inner_bytes(value);
  TORCH_CHECK_VALUE(key_bytes + value_bytes <= row_size, "rows of ", key_bytes + value_bytes,
                    " bytes do not fit a bucket's ", row_size);
  return {static_cast<uint8_t*>(key.data_ptr()),
          static_cast<uint8_t*>(value.data_ptr()),
          key.stride(0) * static_cast<int64_t>(key.element_size()),
          value.stride(0) * static_cast<int64_t>(value.element_size()),
          key_bytes,
          value_bytes};
}

const int64_t* slots_of(const Tensor& slots) {
  TORCH_CHECK_TYPE(slots.scalar_type() == at::kLong, "slots must be int64");
  TORCH_CHECK_VALUE(slots.dim() == 1 && slots.is_contiguous(), "slots must be a contiguous vector");
  return slots.const_data_ptr<int64_t>();
}

void check_slots(const int64_t* slots, int64_t count, int64_t limit) {
  for (int64_t i = 0; i < count; ++i) {
    TORCH_CHECK_VALUE(slots[i] < limit, "slot ", slots[i], " is beyond the bucket's ", limit);
  }
}

// Segment n is of layer layers[n]: tensors[3n], [3n + 1] and [3n + 2] are its keys, its values and their slots. Row i
// of the two goes into the i-th slot; negative slots are padding. Returns the number of rows that were copied.
int64_t segment_write(at::IntArrayRef layers, TensorList tensors, const Tensor& rows, const Tensor& checks) {
  TORCH_CHECK_TYPE(rows.scalar_type() == at::kByte, "rows must be uint8");
  TORCH_CHECK_VALUE(rows.dim() == 3 && rows.is_contiguous(), "rows must be contiguous, [layers, slots, row bytes]");
  TORCH_CHECK_VALUE(tensors.size() == 3 * layers.size(), "a segment is a layer, its keys, its values and their slots");
  const int64_t layer_slots = rows.size(1), bytes = rows.size(2);
  uint8_t* const to = rows.data_ptr<uint8_t>();
  int32_t* const check = int32_data(checks, rows.size(0) * layer_slots, "checks");
  for (size_t n = 0; n < layers.size(); ++n) {
    TORCH_CHECK_VALUE(layers[n] >= 0 && layers[n] < rows.size(0), "layer ", layers[n], " of ", rows.size(0));
    const Tensor& slots = tensors[3 * n + 2];
    check_slots(slots_of(slots), slots.size(0), layer_slots);
    halves(tensors[3 * n], tensors[3 * n + 1], slots.size(0), bytes);
  }
  int64_t written = 0;
  for (size_t n = 0; n < layers.size(); ++n) {
    const Tensor& slots = tensors[3 * n + 2];
    const int64_t count = slots.size(0), first = layers[n] * layer_slots;
    const int64_t* slot = slots.const_data_ptr<int64_t>();
    const Halves from = halves(tensors[3 * n], tensors[3 * n + 1], count, bytes);
    for (int64_t i = 0; i < count; ++i) {
      if (slot[i] < 0) continue;
      uint8_t* row = to + (first + slot[i]) * bytes;
      std::memcpy(row, from.key + i * from.key_stride, from.key_bytes);
      std::memcpy(row + from.key_bytes, from.value + i * from.value_stride, from.value_bytes);
      check[first + slot[i]] = static_cast<int32_t>(checksum_of(row, from.key_bytes + from.value_bytes));
      ++written;
    }
  }
  return written;
}

// Copy slot slots[i] into row i of key and value. Returns the first i whose row is absent or damaged, or -1.
int64_t segment_read(const Tensor& rows, const Tensor& checks, const Tensor& slots, const Tensor& key,
                     const Tensor& value) {
  const Bytes from = bytes_of(rows, "rows");
  const int64_t count = slots.size(0);
  const int64_t* slot = slots_of(slots);
  const Halves to = halves(key, value, count, from.row_bytes);
  const int32_t* check = int32_data(checks, from.rows, "checks");
  check_slots(slot, count, from.rows);
  const int64_t size = to.key_bytes + to.value_bytes;
  for (int64_t i = 0; i < count; ++i) {
    if (slot[i] < 0) return i;
    const uint8_t* row = from.data + slot[i] * from.row_bytes;
    uint8_t* to_key = to.key + i * to.key_stride;
    uint8_t* to_value = to.value + i * to.value_stride;
    std::memcpy(to_key, row, to.key_bytes);
    std::memcpy(to_value, row + to.key_bytes, to.value_bytes);
    // Of the copy, not of the bucket: what is checked is what is used.
    uint32_t crc;
    if (to.key_bytes % 8 == 0) {
      crc = crc32c(crc32c(~0U, to_key, to.key_bytes), to_value, to.value_bytes);
      if (crc == kAbsent) crc = 1;
    } else {
      crc = checksum_of(row, size);
    }
    if (static_cast<uint32_t>(check[slot[i]]) != crc) return i;
  }
  return -1;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tarragon, m) {
  m.def("segment_write(int[] layers, Tensor[] tensors, Tensor(a!) rows, Tensor(b!) checks) -> int");
  m.def("segment_read(Tensor rows, Tensor checks, Tensor slots, Tensor(a!) key, Tensor(b!) value) -> int");
}
TORCH_LIBRARY_IMPL(tarragon, CPU, m) {
  m.impl("segment_write", segment_write);
  m.impl("segment_read", segment_read);
}

}  // namespace tarragon
