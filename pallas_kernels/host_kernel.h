// What the C++ kernels for the CPU share: vectors of floats, the two types of numbers, and the threads.
//
// FOEJAX_PORTABLE leaves out what only the newest processors have, for tests.

#ifndef FOEJAX_HOST_KERNEL_H_
#define FOEJAX_HOST_KERNEL_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kLanes = 16;  // floats of a vector, whatever the processor's own vectors hold

using Bfloat16 = uint16_t;  // its bits
using Floats = float __attribute__((vector_size(kLanes * sizeof(float))));
using Bits = uint32_t __attribute__((vector_size(kLanes * sizeof(uint32_t))));
using HalfBits = uint16_t __attribute__((vector_size(kLanes * sizeof(uint16_t))));

template <class Vector>
inline Vector Load(const void* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}

inline Floats Widen(const float* x) { return Load<Floats>(x); }
inline Floats Widen(const Bfloat16* x) { return (Floats)(__builtin_convertvector(Load<HalfBits>(x), Bits) << 16); }

// The first `count` lanes as numbers of the results' type; to the nearest bfloat16, ties to even, a NaN stays one.
inline void Store(Floats values, float* y, int64_t count) { std::memcpy(y, &values, count * sizeof(float)); }
inline void Store(Floats values, Bfloat16* y, int64_t count) {
  const Bits bits = (Bits)values;
  const Bits nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const HalfBits rounded = __builtin_convertvector(values == values ? nearest : (bits >> 16) | 0x40, HalfBits);
  std::memcpy(y, &rounded, count * sizeof(Bfloat16));
}

// Runs work(0) to work(count - 1) on the caller's thread and on up to `helpers` of the pool's that are free. The caller
// waits for work in progress only, never for a thread to become free, so a full pool cannot block it; a thread that
// comes late finds nothing left and does not touch `work`.
template <class Work>
void RunAll(ffi::ThreadPool& pool, int64_t helpers, int64_t count, const Work& work) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable all_done;
  };
  auto state = std::make_shared<State>();
  auto run = [state, count, &work] {
    for (int64_t index; (index = state->next.fetch_add(1)) < count;) {
      work(index);
      if (state->done.fetch_add(1) + 1 == count) {
        std::lock_guard<std::mutex> lock(state->mutex);
        state->all_done.notify_all();
      }
    }
  };
  helpers = std::min({helpers, count - 1, pool.num_threads() - 1});
  for (int64_t helper = 0; helper < helpers; ++helper) pool.Schedule(std::function<void()>(run));
  run();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->all_done.wait(lock, [&] { return state->done.load() >= count; });
}

}  // namespace

#endif  // FOEJAX_HOST_KERNEL_H_
