// Grouped matmul for the CPU: y[r, :] = x[r, :] times the weights of row r's expert, called by XLA.
//
// Made for few rows an expert, where reading the weights is the work. Every weight is read once, in the order in which
// it lies in memory, a block of rows ahead of its use; all rows of an expert meet it while it is in the cache. A row's
// sums do not depend on which other rows there are.
//
// Words: the weights of an expert are [depth, columns]. A line is the 64 bytes of a cache line: 16 float32 or 32
// bfloat16 columns. A panel is up to 32 lines side by side. A block is up to 128 rows of a panel.
//
// FOEJAX_PORTABLE leaves out what only the newest processors have, for tests.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "host_kernel.h"

#if defined(__AVX512BF16__) && !defined(FOEJAX_PORTABLE)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kLineBytes = 64;
constexpr int64_t kPanelLines = 32;
constexpr int64_t kBlockDepth = 128;
constexpr int64_t kThreadWork = 1 << 20;  // multiply-adds for which another thread is worth waking
constexpr int64_t kTaskRows = 64;  // of one task; their sums, 256 KiB at most, stay in the second-level cache
#if defined(__AVX512F__) && !defined(FOEJAX_PORTABLE)
constexpr int kTileRows = 12;  // whose sums fit the vector registers
#else
constexpr int kTileRows = 3;
#endif

// The arithmetic of one line: `Weights` are the weights of `kDepth` rows of it, `Sums` are float32, and `Order` puts
// them into the order of the columns.

template <class T>
constexpr int64_t kLineColumns = kLineBytes / sizeof(T);

template <class T>
struct Line;

template <>
struct Line<float> {
  static constexpr int kDepth = 1;
  struct Weights {
    Floats values;
  };
  struct Sums {
    Floats values;
  };
  static Weights Read(const float* w, int64_t /*stride*/) { return {Load<Floats>(w)}; }
  static void Add(const Weights& weights, const float* x, Sums& sums) { sums.values += weights.values * *x; }
  static void Order(float* /*sums*/) {}
};

#if defined(__AVX512BF16__) && !defined(FOEJAX_PORTABLE)

template <>
struct Line<Bfloat16> {
  static constexpr int kDepth = 2;
  // The instruction sums products of neighbours, so two rows are interleaved. That puts columns 8i to 8i + 3 into
  // `low` and 8i + 4 to 8i + 7 into `high`.
  struct Weights {
    __m512bh low, high;
  };
  struct Sums {
    __m512 low, high;
  };
  static Weights Read(const Bfloat16* w, int64_t stride) {
    const __m512i even = Load<__m512i>(w), odd = Load<__m512i>(w + stride);
    return {(__m512bh)_mm512_unpacklo_epi16(even, odd), (__m512bh)_mm512_unpackhi_epi16(even, odd)};
  }
  static void Add(const Weights& weights, const Bfloat16* x, Sums& sums) {
    const __m512bh pair = (__m512bh)_mm512_set1_epi32(Load<int32_t>(x));
    sums.low = _mm512_dpbf16_ps(sums.low, weights.low, pair);
    sums.high = _mm512_dpbf16_ps(sums.high, weights.high, pair);
  }
  static void Order(float* sums) {  // of eight columns the low four, then the high four
    const __m512d low = Load<__m512d>(sums), high = Load<__m512d>(sums + 16);
    const __m512i left = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), right = left + 4;
    const __m512d ordered[] = {_mm512_permutex2var_pd(low, left, high), _mm512_permutex2var_pd(low, right, high)};
    std::memcpy(sums, ordered, sizeof(ordered));
  }
};

#else

template <>
struct Line<Bfloat16> {
  static constexpr int kDepth = 1;
  struct Weights {
    Floats left, right;
  };
  struct Sums {
    Floats left, right;
  };
  static Weights Read(const Bfloat16* w, int64_t /*stride*/) { return {Widen(w), Widen(w + kLanes)}; }
  static void Add(const Weights& weights, const Bfloat16* x, Sums& sums) {
    float value;
    const uint32_t bits = static_cast<uint32_t>(*x) << 16;
    std::memcpy(&value, &bits, sizeof(value));
    sums.left += weights.left * value;
    sums.right += weights.right * value;
  }
  static void Order(float* /*sums*/) {}
};

#endif

template <class T>
struct Matrix {
  T* first;
  int64_t stride;
  T* at(int64_t row, int64_t column = 0) const { return first + row * stride + column; }
};

// Walks over the lines of a matrix, `lines` of each row, to have them in the cache when they are needed.
template <class T>
class Ahead {
 public:
  Ahead(Matrix<const T> matrix, int64_t lines)
      : next_(matrix.first), lines_(lines), skip_(matrix.stride - lines * kColumns) {}
  void Fetch() {
    __builtin_prefetch(next_);  // past the end of the weights it does nothing
    next_ += kColumns;
    if (++line_ == lines_) {
      line_ = 0;
      next_ += skip_;
    }
  }

 private:
  static constexpr int64_t kColumns = kLineColumns<T>;
  const T* next_;
  int64_t lines_, skip_, line_ = 0;
};

// Adds x [rows, depth] times `lines` lines of weights [depth, lines] to the sums, `sums_stride` floats apart. The rows
// are template arguments, not a loop, since compilers keep an array in registers only if every index is a constant.
template <class T, size_t... kRow>
void MultiplyLines(std::index_sequence<kRow...>, Matrix<const T> x, Matrix<const T> w, int64_t depth, int64_t lines,
                   Ahead<T> ahead, Matrix<float> sums) {
  using L = Line<T>;
  using Sums = typename L::Sums;
  const T* rows[] = {x.at(kRow)...};
  for (int64_t line = 0; line < lines; ++line) {
    float* line_sums = sums.first + line * kLineColumns<T>;
    Sums tile[] = {Load<Sums>(line_sums + kRow * sums.stride)...};
    const T* weight = w.at(0, line * kLineColumns<T>);
    for (int64_t k = 0; k < depth; k += L::kDepth) {
      for (int i = 0; i < L::kDepth; ++i) ahead.Fetch();
      const typename L::Weights weights = L::Read(weight, w.stride);
      weight += L::kDepth * w.stride;
      (L::Add(weights, rows[kRow] + k, tile[kRow]), ...);
    }
    (std::memcpy(line_sums + kRow * sums.stride, &tile[kRow], sizeof(Sums)), ...);
  }
}

// The same for any number of rows: the largest tiles first.
template <class T, int kRows = kTileRows>
void MultiplyRows(int64_t rows, Matrix<const T> x, Matrix<const T> w, int64_t depth, int64_t lines, Ahead<T> ahead,
                  Matrix<float> sums) {
  if constexpr (kRows > 0) {
    for (; rows >= kRows; rows -= kRows) {
      MultiplyLines<T>(std::make_index_sequence<kRows>(), x, w, depth, lines, ahead, sums);
      x.first += kRows * x.stride;
      sums.first += kRows * sums.stride;
    }
    if (rows > 0) MultiplyRows<T, kRows - 1>(rows, x, w, depth, lines, ahead, sums);
  }
}

// What a thread keeps between its tasks.
template <class T>
struct Scratch {
  std::vector<Floats> sums;  // for their alignment; all are float32
  std::vector<T> weights, rows;
};

// y [rows, columns] = x [rows, depth] times w [depth, columns] for one panel of the columns.
template <class T>
class Panel {
  using Block = Matrix<const T>;

 public:
  Panel(Block w, int64_t depth, int64_t columns) : w_(w), depth_(depth), columns_(columns) {}

  template <class Y>
  void Multiply(Block x, int64_t rows, Matrix<Y> y, Scratch<T>& scratch) const {
    const int64_t whole_lines = columns_ / kColumns, lines = (columns_ + kColumns - 1) / kColumns;
    scratch.sums.assign(rows * lines * kColumns * sizeof(float) / sizeof(Floats), Floats{});
    const Matrix<float> sums = {reinterpret_cast<float*>(scratch.sums.data()), lines * kColumns};
    for (int64_t k = 0; k < depth_; k += kBlockDepth) {
      const int64_t depth = std::min(kBlockDepth, depth_ - k);
      const Ahead<T> ahead({w_.at(k + kBlockDepth), w_.stride}, lines);
      const bool is_odd = depth % Line<T>::kDepth != 0;
      const int64_t direct = is_odd ? 0 : whole_lines;  // what is cut off is read from a padded copy
      const Block x_block = PackRows(x, rows, k, depth, scratch);
      MultiplyRows<T>(rows, x_block, {w_.at(k), w_.stride}, depth, direct, ahead, sums);
      if (direct < lines) {
        const Block w_block = PadWeights(k, depth, direct * kColumns, scratch);
        const Matrix<float> padded_sums = {sums.at(0, direct * kColumns), sums.stride};
        MultiplyRows<T>(rows, x_block, w_block, depth, lines - direct, ahead, padded_sums);
      }
    }
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t column = 0; column < columns_; column += kColumns) {
        Line<T>::Order(sums.at(row, column));
        for (int64_t n = column; n < std::min(columns_, column + kColumns); n += kLanes) {
          Store(Load<Floats>(sums.at(row, n)), y.at(row, n), std::min(kLanes, columns_ - n));
        }
      }
    }
  }

 private:
  static constexpr int64_t kColumns = kLineColumns<T>;

  static Block PackRows(Block x, int64_t rows, int64_t k, int64_t depth, Scratch<T>& scratch) {
    scratch.rows.assign(rows * kBlockDepth, T{});
    for (int64_t row = 0; row < rows; ++row) std::copy_n(x.at(row, k), depth, &scratch.rows[row * kBlockDepth]);
    return {scratch.rows.data(), kBlockDepth};
  }

  Block PadWeights(int64_t k, int64_t depth, int64_t column, Scratch<T>& scratch) const {
    const int64_t columns = columns_ - column, stride = (columns + kColumns - 1) / kColumns * kColumns;
    scratch.weights.assign((depth + 1) * stride, T{});
    for (int64_t row = 0; row < depth; ++row) {
      std::copy_n(w_.at(k + row, column), columns, &scratch.weights[row * stride]);
    }
    return {scratch.weights.data(), stride};
  }

  Block w_;
  int64_t depth_, columns_;
};

struct Task {
  int64_t expert, row, rows, column, columns;
};

template <class T, class Y>
void Multiply(ffi::ThreadPool& pool, ffi::AnyBuffer x, ffi::AnyBuffer w, const int32_t* group_sizes,
              ffi::Result<ffi::AnyBuffer> y) {
  const int64_t num_rows = x.dimensions()[0], depth = x.dimensions()[1];
  const int64_t num_experts = w.dimensions()[0], columns = w.dimensions()[2];
  const T* x_data = reinterpret_cast<const T*>(x.untyped_data());
  const T* w_data = reinterpret_cast<const T*>(w.untyped_data());
  Y* y_data = reinterpret_cast<Y*>(y->untyped_data());
  std::vector<Task> tasks;
  int64_t row = 0;
  for (int64_t expert = 0; expert < num_experts; ++expert) {
    const int64_t stop = std::min<int64_t>(num_rows, row + group_sizes[expert]);
    for (; row < stop; row += std::min(kTaskRows, stop - row)) {
      for (int64_t column = 0; column < columns; column += kPanelLines * kLineColumns<T>) {
        tasks.push_back({expert, row, std::min(kTaskRows, stop - row), column,
                         std::min(kPanelLines * kLineColumns<T>, columns - column)});
      }
    }
  }
  std::fill(y_data + row * columns, y_data + num_rows * columns, Y{});
  const int64_t helpers = row * depth * columns / kThreadWork;
  RunAll(pool, helpers, tasks.size(), [&](int64_t index) {
    static thread_local Scratch<T> scratch;
    const Task& task = tasks[index];
    const Panel<T> panel({w_data + task.expert * depth * columns + task.column, columns}, depth, task.columns);
    const Matrix<Y> y_panel = {y_data + task.row * columns + task.column, columns};
    panel.Multiply({x_data + task.row * depth, depth}, task.rows, y_panel, scratch);
  });
}

ffi::Error GroupedMatmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::Buffer<ffi::S32> group_sizes,
                         ffi::Result<ffi::AnyBuffer> y) {
  const auto types = std::pair(x.element_type(), y->element_type());
  if (types == std::pair(ffi::BF16, ffi::BF16)) {
    Multiply<Bfloat16, Bfloat16>(pool, x, w, group_sizes.typed_data(), y);
  } else if (types == std::pair(ffi::BF16, ffi::F32)) {
    Multiply<Bfloat16, float>(pool, x, w, group_sizes.typed_data(), y);
  } else if (types == std::pair(ffi::F32, ffi::F32)) {
    Multiply<float, float>(pool, x, w, group_sizes.typed_data(), y);
  } else {
    return ffi::Error::InvalidArgument("the grouped matmul for the CPU takes bfloat16 and float32");
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(foejax_grouped_matmul, GroupedMatmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>());
