#include "linear_kernel.h"

#include <algorithm>
#include <cstdlib>
#include <new>

#include "vector.h"

namespace tarragon {
namespace {

constexpr int kStripRows = 6;          // rows of the largest register tile: 12 of AVX2's 16 registers accumulate
constexpr int64_t kBlockBytes = 288 << 10;  // float rows of one block, so that they stay in the L2 cache
constexpr int64_t kBlockRowsMin = 48;
constexpr int64_t kBlockRowsMax = 192;
constexpr int64_t kDepth = 512;        // k per pass over a block: panel slice and strip share the L1 cache
constexpr int kPanelsMax = 4;          // panels that a tile of few rows covers at once
constexpr int64_t kPrefetchBytes = 2048;

// Grows, never shrinks: at most about kBlockRowsMin rows of floats for each compute thread.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  float* floats(int64_t count) {
    if (count > capacity_) {
      std::free(data_);
      capacity_ = 0;
      data_ = static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>((count * 4 + 63) / 64 * 64)));
      if (data_ == nullptr) throw std::bad_alloc();
      capacity_ = count;
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  int64_t capacity_ = 0;
};

thread_local Scratch scratch;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of every block but the last one: blocks of nearly equal height.
int64_t block_rows(const LinearCall& call) {
  const int64_t fitting = kBlockBytes / (4 * std::max<int64_t>(call.k, 1)) / kStripRows * kStripRows;
  const int64_t most = std::clamp(fitting, kBlockRowsMin, kBlockRowsMax);
  return divide_up(call.rows, std::max<int64_t>(1, divide_up(call.rows, most)));
}

// Rows of the float copy start on different cache sets.
int64_t float_stride(int64_t k) { return (k + 15) / 16 * 16 + 16; }

template <class T>
void to_floats(const T* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store8(to + i, load8(from + i));
  if (i < count) {
    T tail[kLanes] = {};
    std::copy(from + i, from + count, tail);
    float floats[kLanes];
    store8(floats, load8(tail));
    std::copy(floats, floats + (count - i), to + i);
  }
}

// The only place that multiplies. sums: [Panels][rows of the block][16], `sums_stride` floats between panels;
// adds x[i, k] * w[p][k][:] for k in order onto what is there.
template <class T, int Rows, int Panels>
TARRAGON_INLINE void tile(const float* x, int64_t x_stride, const T* w, int64_t w_stride, int64_t depth, float* sums,
          int64_t sums_stride) {
  Vec8 sum[Rows][2 * Panels];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 16
    for (int p = 0; p < Panels; ++p) {
      sum[i][2 * p] = load8(sums + p * sums_stride + i * kPanel);
      sum[i][2 * p + 1] = load8(sums + p * sums_stride + i * kPanel + kLanes);
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec8 weight[2 * Panels];
#pragma GCC unroll 16
    for (int p = 0; p < Panels; ++p) {
      const T* row = w + p * w_stride + k * kPanel;
      __builtin_prefetch(reinterpret_cast<const char*>(row) + kPrefetchBytes);
      load_panel_row(row, weight[2 * p], weight[2 * p + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const Vec8 value = broadcast8(x + i * x_stride + k);
#pragma GCC unroll 16
      for (int j = 0; j < 2 * Panels; ++j) sum[i][j] = multiply_add(value, weight[j], sum[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 16
    for (int p = 0; p < Panels; ++p) {
      store8(sums + p * sums_stride + i * kPanel, sum[i][2 * p]);
      store8(sums + p * sums_stride + i * kPanel + kLanes, sum[i][2 * p + 1]);
    }
  }
}

template <class T>
using TileFunction = void (*)(const float*, int64_t, const T*, int64_t, int64_t, float*, int64_t);

template <class T, int Rows, int Panels>
void tile_function(const float* x, int64_t x_stride, const T* w, int64_t w_stride, int64_t depth, float* sums,
                   int64_t sums_stride) {
  tile<T, Rows, Panels>(x, x_stride, w, w_stride, depth, sums, sums_stride);
}

template <class T>
TileFunction<T> strip_tile(int64_t rows) {
  static constexpr TileFunction<T> table[kStripRows] = {
      tile_function<T, 1, 1>, tile_function<T, 2, 1>, tile_function<T, 3, 1>,
      tile_function<T, 4, 1>, tile_function<T, 5, 1>, tile_function<T, 6, 1>};
  return table[rows - 1];
}

// Bias and the one rounding, for one panel of a block.
template <class T>
void finish_panel(const LinearCall& call, int64_t panel, const float* sums, int64_t row, int64_t rows) {
  const int64_t column = panel * kPanel;
  const int64_t columns = std::min<int64_t>(kPanel, call.n - column);
  float bias[kPanel] = {};
  if (call.bias != nullptr) {
    switch (call.bias_storage) {
      case Storage::kBFloat16: to_floats(static_cast<const bf16*>(call.bias) + column, bias, columns); break;
      case Storage::kFloat16: to_floats(static_cast<const fp16*>(call.bias) + column, bias, columns); break;
      case Storage::kFloat32: to_floats(static_cast<const float*>(call.bias) + column, bias, columns); break;
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    T* out = static_cast<T*>(call.out) + (row + i) * call.n + column;
    Vec8 low = load8(sums + i * kPanel), high = load8(sums + i * kPanel + kLanes);
    if (call.bias != nullptr) {
      low = add(low, load8(bias));
      high = add(high, load8(bias + kLanes));
    }
    if (columns == kPanel) {
      store8(out, low);
      store8(out + kLanes, high);
    } else {
      T rounded[kPanel];
      store8(rounded, low);
      store8(rounded + kLanes, high);
      std::copy(rounded, rounded + columns, out);
    }
  }
}

// One or two rows: the weights' bytes are the cost. Several panels at once keep enough multiply-adds in flight.
template <class T, int Rows, int Panels>
int64_t run_thin(const LinearCall& call, const float* x, int64_t row, int64_t panel, int64_t end, float* sums) {
  const T* packed = static_cast<const T*>(call.packed);
  const int64_t panel_size = call.k * kPanel;
  for (; panel + Panels <= end; panel += Panels) {
    std::fill(sums, sums + Panels * Rows * kPanel, 0.0f);
    tile<T, Rows, Panels>(x, float_stride(call.k), packed + panel * panel_size, panel_size, call.k, sums,
                          Rows * kPanel);
    for (int p = 0; p < Panels; ++p) finish_panel<T>(call, panel + p, sums + p * Rows * kPanel, row, Rows);
  }
  return panel;
}

template <class T>
void run_panel(const LinearCall& call, const float* x, int64_t row, int64_t rows, int64_t panel, float* sums) {
  const int64_t stride = float_stride(call.k);
  const T* w = static_cast<const T*>(call.packed) + panel * call.k * kPanel;
  std::fill(sums, sums + rows * kPanel, 0.0f);
  // Strips of nearly equal height: a lone last row would leave the multipliers idle.
  const int64_t strips = divide_up(rows, kStripRows);
  const int64_t height = rows / strips, taller = rows % strips;
  for (int64_t k = 0; k < call.k; k += kDepth) {
    const int64_t depth = std::min(kDepth, call.k - k);
    int64_t i = 0;
    for (int64_t s = 0; s < strips; ++s) {
      const int64_t strip_rows = height + (s < taller ? 1 : 0);
      strip_tile<T>(strip_rows)(x + i * stride + k, stride, w + k * kPanel, 0, depth, sums + i * kPanel, 0);
      i += strip_rows;
    }
  }
  finish_panel<T>(call, panel, sums, row, rows);
}

template <class T>
void run(const LinearCall& call, int64_t begin, int64_t end) {
  const int64_t panels = panel_count(call.n);
  const int64_t rows_max = block_rows(call);
  const int64_t stride = float_stride(call.k);
  const int64_t sums_size = std::max<int64_t>(rows_max, 4) * kPanel * kPanelsMax;
  float* sums = scratch.floats(sums_size + rows_max * stride);
  float* x = sums + sums_size;
  for (int64_t task = begin; task < end;) {
    const int64_t row = task / panels * rows_max;
    const int64_t rows = std::min(rows_max, call.rows - row);
    for (int64_t i = 0; i < rows; ++i) {
      to_floats(static_cast<const T*>(call.x) + (row + i) * call.x_stride, x + i * stride, call.k);
    }
    int64_t panel = task % panels;
    const int64_t stop = std::min(panels, panel + (end - task));
    task += stop - panel;
    if (rows == 1) panel = run_thin<T, 1, 4>(call, x, row, panel, stop, sums);
    if (rows == 2) panel = run_thin<T, 2, 2>(call, x, row, panel, stop, sums);
    for (; panel < stop; ++panel) run_panel<T>(call, x, row, rows, panel, sums);
  }
}

template <class T>
void pack(const T* weight, T* packed, int64_t n, int64_t k, int64_t stride, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    for (int c = 0; c < kPanel; ++c) {
      const int64_t row = panel * kPanel + c;
      T* to = packed + panel * k * kPanel + panel_position<T>(c);
      const T* from = weight + row * stride;
      for (int64_t i = 0; i < k; ++i) to[i * kPanel] = row < n ? from[i] : T{};
    }
  }
}

}  // namespace

void pack_panels(const void* weight, void* packed, int64_t n, int64_t k, int64_t stride, Storage storage,
                 int64_t begin, int64_t end) {
  switch (storage) {
    case Storage::kBFloat16:
      return pack(static_cast<const bf16*>(weight), static_cast<bf16*>(packed), n, k, stride, begin, end);
    case Storage::kFloat16:
      return pack(static_cast<const fp16*>(weight), static_cast<fp16*>(packed), n, k, stride, begin, end);
    case Storage::kFloat32:
      return pack(static_cast<const float*>(weight), static_cast<float*>(packed), n, k, stride, begin, end);
  }
}

int64_t linear_tasks(const LinearCall& call) {
  return call.rows == 0 ? 0 : divide_up(call.rows, block_rows(call)) * panel_count(call.n);
}

void linear_run(const LinearCall& call, int64_t begin, int64_t end) {
  switch (call.storage) {
    case Storage::kBFloat16: return run<bf16>(call, begin, end);
    case Storage::kFloat16: return run<fp16>(call, begin, end);
    case Storage::kFloat32: return run<float>(call, begin, end);
  }
}

const char* linear_instruction_set() {
#if TARRAGON_AVX2
  return "avx2+fma";
#elif defined(FP_FAST_FMAF)
  return "portable+fma";
#else
  return "portable";
#endif
}

}  // namespace tarragon
