// Attention over a paged cache for the CPU, called by XLA: `xla.py` beside this file says the same in JAX.
//
// Every block of a sequence is read once for all queries of the sequence that share its key/value head, in the order of
// its positions, with a running softmax (arXiv 2205.14135, algorithm 1). Sums are float32.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "host_kernel.h"

namespace {

// exp of numbers <= 0: a power of two times the series of what is left, which is at most ln 2 / 2.
inline Floats Exp(Floats x) {
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693145752f, kLn2Low = 1.42860677e-6f;
  x = x < -87.0f ? Floats{} - 87.0f : x;
  const Floats magic = Floats{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Floats whole = (x * kLog2E + magic) - magic;
  const Floats rest = (x - whole * kLn2High) - whole * kLn2Low;
  Floats series = Floats{} + 1.0f;
  for (float inverse : {1.0f / 7, 1.0f / 6, 1.0f / 5, 1.0f / 4, 1.0f / 3, 1.0f / 2, 1.0f}) {
    series = series * (rest * inverse) + 1.0f;
  }
  const auto exponent = __builtin_convertvector(whole, int32_t __attribute__((vector_size(sizeof(Floats))))) + 127;
  return series * (Floats)(exponent << 23);
}

// Halves are added, then quarters: far fewer instructions than lane after lane.
inline float Sum(Floats x) {
  using Half = float __attribute__((vector_size(sizeof(Floats) / 2)));
  using Quarter = float __attribute__((vector_size(sizeof(Floats) / 4)));
  float lanes[kLanes];
  std::memcpy(lanes, &x, sizeof(x));
  const Half half = Load<Half>(lanes) + Load<Half>(lanes + kLanes / 2);
  std::memcpy(lanes, &half, sizeof(half));
  const Quarter quarter = Load<Quarter>(lanes) + Load<Quarter>(lanes + kLanes / 4);
  return (quarter[0] + quarter[1]) + (quarter[2] + quarter[3]);
}

// Calls work(std::index_sequence<0, 1, ...>, first) for chunks of up to eight of `count` vectors: compilers keep an
// array in registers only if every index is a constant.
template <int kMost = 8, class Work>
void InChunks(int64_t count, const Work& work, int64_t first = 0) {
  if constexpr (kMost > 0) {
    for (; count - first >= kMost; first += kMost) work(std::make_index_sequence<kMost>(), first);
    if (first < count) InChunks<kMost - 1>(count, work, first);
  }
}

template <size_t... kN>
inline void AddDot(std::index_sequence<kN...>, const Floats* q, const Floats* k, Floats& dot) {
  ((dot += q[kN] * k[kN]), ...);
}

// sums = sums * kept + the weighted values of `tokens` tokens, which lie `stride` vectors apart.
template <size_t... kN>
inline void AddValues(std::index_sequence<kN...>, const float* weights, int64_t tokens, const Floats* values,
                      int64_t stride, float kept, Floats* sums) {
  Floats sum[] = {(sums[kN] * kept)...};
  for (int64_t token = 0; token < tokens; ++token, values += stride) {
    ((sum[kN] += values[kN] * weights[token]), ...);
  }
  ((sums[kN] = sum[kN]), ...);
}

struct Shape {
  int64_t rows, length, groups, queries, head, kv_heads, block, table;  // R, T, S, Q, K, G, C, B
  int64_t share() const { return queries / kv_heads; }
  int64_t vectors() const { return (head + kLanes - 1) / kLanes; }
};

template <class T>
struct Operands {
  const T *q_RTSQK, *k_XSGCK, *v_XSGCK;
  const int32_t *table_RB, *positions_RT, *first_block;
  T* out_RTSQK;
};

// What a thread keeps between its tasks; vectors are padded with zeros to a multiple of kLanes.
struct Scratch {
  std::vector<Floats> queries, keys, values, sums;
  std::vector<float> peaks, totals;
};

template <class T>
void Unpack(const T* x, int64_t size, Floats* vectors) {
  for (; size >= kLanes; size -= kLanes, x += kLanes) *vectors++ = Widen(x);
  if (size > 0) {
    T padded[kLanes] = {};
    std::copy_n(x, size, padded);
    *vectors = Widen(padded);
  }
}

// The attention of one row's queries that share key/value head `kv` of `group`.
template <class T>
class HeadTask {
 public:
  HeadTask(const Shape& shape, const Operands<T>& operands, int64_t index, Scratch& scratch)
      : shape_(shape),
        operands_(operands),
        row_(index / (shape.kv_heads * shape.groups)),
        group_(index / shape.kv_heads % shape.groups),
        kv_(index % shape.kv_heads),
        scratch_(scratch) {}

  void Run() {
    const int64_t queries = shape_.length * shape_.share(), vectors = shape_.vectors();
    scratch_.queries.resize(queries * vectors);
    scratch_.keys.resize(shape_.block * vectors);
    scratch_.values.resize(shape_.block * vectors);
    scratch_.sums.assign(queries * vectors, Floats{});
    scratch_.peaks.assign(queries, -std::numeric_limits<float>::infinity());
    scratch_.totals.assign(queries, 0.0f);
    int32_t last = -1;
    for (int64_t query = 0; query < queries; ++query) {
      last = std::max(last, position(query));
      Unpack(operands_.q_RTSQK + offset(query), shape_.head, &scratch_.queries[query * vectors]);
    }
    for (int64_t start = 0; start <= last; start += shape_.block) {
      if (start + shape_.block <= last) FetchBlock(start / shape_.block + 1);
      ReadBlock(start / shape_.block);
      for (int64_t query = 0; query < queries; ++query) {
        const int64_t seen = std::min<int64_t>(shape_.block, position(query) + 1 - start);
        if (seen > 0) Attend(query, seen);
      }
    }
    for (int64_t query = 0; query < queries; ++query) Write(query);
  }

 private:
  int32_t position(int64_t query) const {
    return operands_.positions_RT[row_ * shape_.length + query / shape_.share()];
  }

  int64_t offset(int64_t query) const {
    const int64_t token = row_ * shape_.length + query / shape_.share();
    const int64_t head = kv_ * shape_.share() + query % shape_.share();
    return ((token * shape_.groups + group_) * shape_.queries + head) * shape_.head;
  }

  // Where the block with this index in the row's table starts in the cache.
  int64_t block_offset(int64_t index) const {
    const int64_t block = operands_.table_RB[row_ * shape_.table + index] + *operands_.first_block;
    return ((block * shape_.groups + group_) * shape_.kv_heads + kv_) * shape_.block * shape_.head;
  }

  void FetchBlock(int64_t index) {
    constexpr int64_t kLineNumbers = 64 / sizeof(T);
    const int64_t first = block_offset(index);
    for (int64_t n = first; n < first + shape_.block * shape_.head; n += kLineNumbers) {
      __builtin_prefetch(operands_.k_XSGCK + n);
      __builtin_prefetch(operands_.v_XSGCK + n);
    }
  }

  void ReadBlock(int64_t index) {
    const int64_t first = block_offset(index);
    for (int64_t token = 0; token < shape_.block; ++token) {
      const int64_t from = first + token * shape_.head, to = token * shape_.vectors();
      Unpack(operands_.k_XSGCK + from, shape_.head, &scratch_.keys[to]);
      Unpack(operands_.v_XSGCK + from, shape_.head, &scratch_.values[to]);
    }
  }

  // Takes the first `seen` tokens of the block into a query's softmax, up to kLanes at a time.
  void Attend(int64_t query, int64_t seen) {
    const int64_t vectors = shape_.vectors();
    const Floats* q = &scratch_.queries[query * vectors];
    Floats* sums = &scratch_.sums[query * vectors];
    const float scale = 1.0f / std::sqrt(static_cast<float>(shape_.head));
    for (int64_t start = 0; start < seen; start += kLanes) {
      const int64_t tokens = std::min(kLanes, seen - start);
      Floats dots[kLanes] = {};
      InChunks(vectors, [&](auto chunk, int64_t n) {
        const Floats* k = &scratch_.keys[start * vectors + n];
        for (int64_t token = 0; token < tokens; ++token) AddDot(chunk, q + n, k + token * vectors, dots[token]);
      });
      float logits[kLanes], weights[kLanes];
      std::fill_n(logits, kLanes, -std::numeric_limits<float>::infinity());
      for (int64_t token = 0; token < tokens; ++token) logits[token] = Sum(dots[token]) * scale;
      const float before = scratch_.peaks[query];
      const float peak = std::max(before, *std::max_element(logits, logits + tokens));
      const Floats all_weights = Exp(Load<Floats>(logits) - peak);
      std::memcpy(weights, &all_weights, sizeof(weights));
      const float kept = before < peak ? std::exp(before - peak) : 1.0f;
      InChunks(vectors, [&](auto chunk, int64_t n) {
        AddValues(chunk, weights, tokens, &scratch_.values[start * vectors + n], vectors, kept, sums + n);
      });
      scratch_.peaks[query] = peak;
      scratch_.totals[query] = scratch_.totals[query] * kept + std::accumulate(weights, weights + tokens, 0.0f);
    }
  }

  void Write(int64_t query) {
    const float total = scratch_.totals[query];
    T* out = operands_.out_RTSQK + offset(query);
    for (int64_t n = 0; n < shape_.vectors(); ++n) {
      const Floats sums = scratch_.sums[query * shape_.vectors() + n];
      Store(total > 0.0f ? sums / total : Floats{}, out + n * kLanes, std::min(kLanes, shape_.head - n * kLanes));
    }
  }

  const Shape& shape_;
  const Operands<T>& operands_;
  const int64_t row_, group_, kv_;
  Scratch& scratch_;
};

template <class T>
void Attend(ffi::ThreadPool& pool, const Shape& shape, const Operands<T>& operands) {
  RunAll(pool, pool.num_threads(), shape.rows * shape.groups * shape.kv_heads, [&](int64_t index) {
    static thread_local Scratch scratch;
    HeadTask<T>(shape, operands, index, scratch).Run();
  });
}

ffi::Error PagedAttention(ffi::ThreadPool pool, ffi::AnyBuffer q_RTSQK, ffi::AnyBuffer k_XSGCK, ffi::AnyBuffer v_XSGCK,
                          ffi::Buffer<ffi::S32> table_RB, ffi::Buffer<ffi::S32> positions_RT,
                          ffi::Buffer<ffi::S32> first_block, ffi::Result<ffi::AnyBuffer> out_RTSQK) {
  const auto q = q_RTSQK.dimensions(), k = k_XSGCK.dimensions();
  const Shape shape = {q[0], q[1], q[2], q[3], q[4], k[2], k[3], static_cast<int64_t>(table_RB.dimensions()[1])};
  auto attend = [&](auto number) {
    using T = decltype(number);
    Attend<T>(pool, shape,
              {static_cast<const T*>(q_RTSQK.untyped_data()), static_cast<const T*>(k_XSGCK.untyped_data()),
               static_cast<const T*>(v_XSGCK.untyped_data()), table_RB.typed_data(), positions_RT.typed_data(),
               first_block.typed_data(), static_cast<T*>(out_RTSQK->untyped_data())});
  };
  if (q_RTSQK.element_type() == ffi::BF16) {
    attend(Bfloat16());
  } else if (q_RTSQK.element_type() == ffi::F32) {
    attend(float());
  } else {
    return ffi::Error::InvalidArgument("the paged attention for the CPU takes bfloat16 and float32");
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(foejax_paged_attention, PagedAttention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>());
