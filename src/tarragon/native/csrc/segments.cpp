// tarragon_segment_write, tarragon::segment_read: K,V rows into a checkpoint bucket and back (6.1).
#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>
#include <torch/library.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>

#include "checks.h"
#include "crc32c.h"
#include "populated.h"

namespace tarragon {
namespace {

using at::Tensor;

constexpr uint32_t kNever = 0;  // the checksum of a row that was never written

uint32_t checksum_of(const uint8_t* row, int64_t size) {
  const uint32_t crc = crc32c(~0U, row, size);
  return crc == kNever ? 1 : crc;
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

// New rows of one layer.
struct Segment {
  int64_t layer, count;
  const int64_t* slot;
  Halves from;
};

// The bucket that is written; native/segments.py has the same layout.
struct Target {
  uint8_t* rows;
  int32_t* checks;
  int64_t layers, slots, row_bytes;
  const Populated* pages;  // of rows
};

// The tensor that Python's `_cdata` names; somebody else keeps it alive.
Tensor tensor_of(void* impl) {
  using Pointer = c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;
  return Tensor::wrap_tensor_impl(Pointer::reclaim_copy(static_cast<c10::TensorImpl*>(impl)));
}

Segment segment_of(const Target& to, int64_t layer, void* const* parts) {
  TORCH_CHECK_VALUE(layer >= 0 && layer < to.layers, "layer ", layer, " of ", to.layers);
  const Tensor slots = tensor_of(parts[2]);
  const int64_t* slot = slots_of(slots);
  check_slots(slot, slots.size(0), to.slots);
  return {layer, slots.size(0), slot, halves(tensor_of(parts[0]), tensor_of(parts[1]), slots.size(0), to.row_bytes)};
}

struct Written {
  int64_t rows = 0;
  bool wants_pages = false;
};

// Negative slots are padding.
void write_segment(const Target& to, const Segment& segment, Written& written) {
  const Halves& from = segment.from;
  const int64_t first = segment.layer * to.slots, bytes = from.key_bytes + from.value_bytes;
  for (int64_t i = 0; i < segment.count; ++i) {
    const int64_t slot = segment.slot[i];
    if (slot < 0) continue;
    uint8_t* row = to.rows + (first + slot) * to.row_bytes;
    written.wants_pages |= need(*to.pages, row, to.row_bytes);
    std::memcpy(row, from.key + i * from.key_stride, from.key_bytes);
    std::memcpy(row + from.key_bytes, from.value + i * from.value_stride, from.value_bytes);
    to.checks[first + slot] = static_cast<int32_t>(checksum_of(row, bytes));
    ++written.rows;
  }
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
      if (crc == kNever) crc = 1;
    } else {
      crc = checksum_of(row, size);
    }
    if (static_cast<uint32_t>(check[slot[i]]) != crc) return i;
  }
  return -1;
}

}  // namespace

// Write segments: layers[n]'s key, value and slots are tensors[3n], [3n + 1] and [3n + 2]. Returns the number of rows,
// or -1 with a message in `error`: nothing was written then. No op of torch's, see tarragon_commit.
extern "C" __attribute__((visibility("default"))) int64_t tarragon_segment_write(
    const Target* to, int64_t count, const int64_t* layers, void* const* tensors, char* error, int64_t error_bytes) {
  try {
    c10::SmallVector<Segment, 16> segments;
    for (int64_t n = 0; n < count; ++n) segments.push_back(segment_of(*to, layers[n], tensors + 3 * n));
    Written written;
    for (const Segment& segment : segments) write_segment(*to, segment, written);
    if (written.wants_pages) want(*to->pages);
    return written.rows;
  } catch (const c10::Error& caught) {
    std::snprintf(error, error_bytes, "%s", caught.what_without_backtrace());
  } catch (const std::exception& caught) {
    std::snprintf(error, error_bytes, "%s", caught.what());
  }
  return -1;
}

TORCH_LIBRARY_FRAGMENT(tarragon, m) {
  m.def("segment_read(Tensor rows, Tensor checks, Tensor slots, Tensor(a!) key, Tensor(b!) value) -> int");
}
TORCH_LIBRARY_IMPL(tarragon, CPU, m) { m.impl("segment_read", segment_read); }

}  // namespace tarragon
