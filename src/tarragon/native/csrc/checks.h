// Checks that the ops share. A caller's mistake raises ValueError or TypeError before anything is written.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <cstring>

namespace tarragon {

// A copy as raw bytes needs no arithmetic type; only the sizes must agree.
inline int64_t row_bytes(const at::Tensor& rows) { return rows.size(1) * static_cast<int64_t>(rows.element_size()); }

inline void check_rows(const at::Tensor& rows, int64_t hidden, at::ScalarType type, const char* name) {
  TORCH_CHECK_VALUE(rows.dim() == 2 && rows.size(1) == hidden, name, " must be [*, ", hidden, "], but is ",
                    rows.sizes());
  TORCH_CHECK_VALUE(hidden <= 1 || rows.stride(1) == 1, name, " must have contiguous rows");
  TORCH_CHECK_TYPE(rows.scalar_type() == type, name, " must be ", type, ", but is ", rows.scalar_type());
}

// The data of a contiguous int32 vector of at least `count` elements.
inline int32_t* int32_data(const at::Tensor& tensor, int64_t count, const char* name) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kInt, name, " must be int32, but is ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.is_contiguous() && tensor.numel() >= count, name, " must be contiguous with at least ",
                    count, " elements, but is ", tensor.sizes());
  return tensor.data_ptr<int32_t>();
}

// A contiguous matrix of bytes.
struct Bytes {
  uint8_t* data;
  int64_t rows, row_bytes;
};

inline Bytes bytes_of(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kByte, name, " must be uint8");
  TORCH_CHECK_VALUE(tensor.dim() == 2 && tensor.is_contiguous(), name, " must be a contiguous matrix");
  return {tensor.data_ptr<uint8_t>(), tensor.size(0), tensor.size(1)};
}

}  // namespace tarragon
