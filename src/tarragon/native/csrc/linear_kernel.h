// The batch-invariant linear without torch: y[m, n] = round(sum over k of x[m, k] * w[n, k] + bias[n]).
//
// Every output is one chain of float32 multiply-adds over k = 0, 1, 2, ..., whatever the number of rows, the
// row's position, the thread count and the blocking: blocking only moves the chain's intermediate value between
// registers and memory, which is exact. So a row's result depends on that row and the weights alone.
#pragma once

#include <cstdint>

namespace tarragon {

enum class Storage : int { kBFloat16 = 0, kFloat16 = 1, kFloat32 = 2 };

struct LinearCall {
  const void* x;       // [rows, k], rows `x_stride` elements apart
  const void* packed;  // [panels][k][16], see pack()
  const void* bias;    // [n] or null
  void* out;           // [rows, n], contiguous
  int64_t x_stride;
  int64_t rows;
  int64_t k;
  int64_t n;
  Storage storage;       // of x, packed and out
  Storage bias_storage;  // of bias
};

inline int64_t panel_count(int64_t n) { return (n + 15) / 16; }

// Write panels [begin, end) of weight [n, k] (rows `stride` elements apart); columns beyond n are zero.
void pack_panels(const void* weight, void* packed, int64_t n, int64_t k, int64_t stride, Storage storage,
                 int64_t begin, int64_t end);

// A call is cut into independent tasks, numbered row block by row block; any thread may run any range of them.
int64_t linear_tasks(const LinearCall& call);
void linear_run(const LinearCall& call, int64_t begin, int64_t end);

// "avx2+fma", "portable+fma" or "portable": names the arithmetic that results depend on and its speed class.
const char* linear_instruction_set();

}  // namespace tarragon
