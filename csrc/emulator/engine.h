// Runs CUDA kernels on the CPU, for tests: no toolkit, no GPU.
//
// One block at a time; each CUDA thread is a fiber on its own small stack and runs until it waits at a barrier or in a
// warp collective. When nobody can run any more, complete collectives are carried out, else a complete barrier is
// opened, else the launch fails with a report of who waits where. The order in which threads and blocks take their turn
// is chosen by `order`; a result that depends on it is a race. Fresh shared memory holds 0xFF bytes (NaN).
//
// Cannot be shown: tensor-core instructions, asynchronous copies, races inside a stretch of code without a wait.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace megalm::emulator {

struct Index3 {
  unsigned x, y, z;
};

struct Size3 {
  unsigned x, y, z;
  constexpr Size3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  uint64_t count() const { return uint64_t(x) * y * z; }
};

enum class Collective : uint8_t { kSync, kShuffle, kBallot, kMatch };

constexpr const char* name_of(Collective kind) {
  constexpr const char* kNames[] = {"__syncwarp", "a shuffle", "a ballot", "a match"};
  return kNames[static_cast<int>(kind)];
}

constexpr unsigned kWarpSize = 32;
constexpr size_t kStaticSharedLimit = 48 * 1024;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 * 1024;
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif

struct Thread {
  enum State : uint8_t { kReady, kAtBarrier, kInCollective, kFinished };

  Index3 index{};
  unsigned id = 0;
  State state = kFinished;
  int line = 0;  // of the wait

  // The collective that it waits in.
  Collective kind = Collective::kSync;
  unsigned mask = 0, source = 0;
  uint64_t value = 0, result = 0;

  char* stack = nullptr;
  bool entered = false;  // the stack holds a live frame
  void* fake_stack = nullptr;
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context{};
#endif

  unsigned lane() const { return id % kWarpSize; }
};

class Engine {
 public:
  // 0: in order; 1: reversed; any other number seeds a shuffle, anew each time round.
  unsigned order = 0;
  uint64_t launches = 0, switches = 0;

  static Engine& instance() {
    static Engine engine;
    return engine;
  }

  Size3 grid, block;
  Index3 block_index{};
  Thread* current = nullptr;

  template <typename Body>
  void launch(Size3 grid_size, Size3 block_size, size_t dynamic_bytes, Body&& body) {
    check_limits(grid_size, block_size, dynamic_bytes);
    grid = grid_size;
    block = block_size;
    entry_ = [](void* argument) { (*static_cast<std::remove_reference_t<Body>*>(argument))(); };
    argument_ = &body;
    random_.seed(order);
    ++launches;
    for (uint64_t number : turns(grid.count())) {
      block_index = {unsigned(number % grid.x), unsigned(number / grid.x % grid.y),
                     unsigned(number / (uint64_t(grid.x) * grid.y))};
      run_block(dynamic_bytes);
    }
  }

  // __syncthreads
  void barrier(int line) {
    current->line = line;
    current->state = Thread::kAtBarrier;
    switch_to(*current, host_);
  }

  // A warp collective; returns this lane's result.
  uint64_t collective(Collective kind, unsigned mask, uint64_t value, unsigned source, int line) {
    Thread& me = *current;
    me.line = line;
    if (!(mask >> me.lane() & 1)) fail(std::string("a lane calls ") + name_of(kind) + " without being in its mask");
    me.kind = kind;
    me.mask = mask;
    me.value = value;
    me.source = source;
    me.state = Thread::kInCollective;
    switch_to(me, host_);
    return me.result;
  }

  // Static shared memory of the running block, by the address of its declaration.
  void* shared(const void* key, size_t bytes, int line) {
    for (const auto& [known, memory] : static_shared_) {
      if (known == key) return memory;
    }
    static_shared_bytes_ += bytes;
    current->line = line;
    if (static_shared_bytes_ > kStaticSharedLimit) fail("more than 48 KiB of static shared memory");
    static_shared_.emplace_back(key, poisoned(bytes));
    return static_shared_.back().second;
  }

  void* dynamic_shared() { return dynamic_shared_; }

  void check_aligned(const void* address, size_t bytes, int line) {
    if (reinterpret_cast<uintptr_t>(address) % bytes == 0) return;
    if (current) current->line = line;
    fail("misaligned access of " + std::to_string(bytes) + " bytes");
  }

  // Gives up the launch from inside a thread.
  [[noreturn]] void fail(const std::string& why) {
    const Thread& t = *current;
    error_ =
        why + " [block " + text(block_index) + ", thread " + text(t.index) + ", line " + std::to_string(t.line) + "]";
    switch_to(*current, host_);
    abort();
  }

 private:
  static std::string text(const Index3& i) {
    return std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z);
  }

  static void check_limits(const Size3& grid, const Size3& block, size_t dynamic_bytes) {
    const auto refuse = [](const std::string& what) { throw std::runtime_error("invalid launch: " + what); };
    if (block.count() == 0 || grid.count() == 0) refuse("an empty grid or block");
    if (block.count() > 1024) refuse(std::to_string(block.count()) + " threads in a block, at most 1024");
    if (block.z > 64) refuse("block.z is " + std::to_string(block.z) + ", at most 64");
    if (grid.x > 0x7fffffffu) refuse("grid.x is beyond 2^31 - 1");
    if (grid.y > 65535 || grid.z > 65535) refuse("grid.y or grid.z is beyond 65535");
    if (dynamic_bytes > kStaticSharedLimit) refuse("more than 48 KiB of dynamic shared memory");
  }

  static void* poisoned(size_t bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 16, std::max<size_t>(bytes, 1)) != 0) throw std::bad_alloc();
    memset(memory, 0xFF, bytes);
    return memory;
  }

  std::vector<uint64_t> turns(uint64_t count) {
    std::vector<uint64_t> result(count);
    std::iota(result.begin(), result.end(), uint64_t(0));
    if (order == 1) std::reverse(result.begin(), result.end());
    if (order > 1) std::shuffle(result.begin(), result.end(), random_);
    return result;
  }

  void run_block(size_t dynamic_bytes) {
    const unsigned count = unsigned(block.count());
    if (threads_.size() < count) threads_.resize(1024);
    for (unsigned i = 0; i < count; ++i) {
      Thread& t = threads_[i];
      t.id = i;
      t.index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
      t.state = Thread::kReady;
      if (!t.entered) prepare(t);
    }
    count_ = count;
    if (dynamic_bytes) dynamic_shared_ = poisoned(dynamic_bytes);
    while (error_.empty()) {
      bool ran = false;
      for (uint64_t i : turns(count)) {
        Thread& t = threads_[i];
        if (t.state != Thread::kReady) continue;
        ran = true;
        current = &t;
        switch_to(host_, t);
        current = nullptr;
        if (!error_.empty()) break;
      }
      if (ran || !error_.empty()) continue;
      if (std::all_of(threads_.begin(), threads_.begin() + count, [](auto& t) { return t.state == Thread::kFinished; }))
        break;
      if (!finish_collectives() && !open_barrier()) error_ = stuck();
    }
    free(dynamic_shared_);
    dynamic_shared_ = nullptr;
    for (const auto& part : static_shared_) free(part.second);
    static_shared_.clear();
    static_shared_bytes_ = 0;
    if (error_.empty()) return;
    for (Thread& t : threads_) t.entered = false;  // their stacks hold half-run kernels: begin them anew
    throw std::runtime_error(std::exchange(error_, {}));
  }

  // Carries out every warp collective whose lanes have all arrived; returns whether there was one.
  bool finish_collectives() {
    bool any = false;
    for (unsigned i = 0; i < count_; ++i) {
      Thread& t = threads_[i];
      if (t.state != Thread::kInCollective || t.lane() != unsigned(__builtin_ctz(t.mask))) continue;
      if (!everyone_is_here(t)) continue;
      carry_out(t);
      if (!error_.empty()) return true;
      any = true;
    }
    return any;
  }

  template <typename Body>
  void for_lanes(const Thread& t, Body&& body) {
    Thread* warp = &threads_[t.id - t.lane()];
    for (unsigned mask = t.mask; mask; mask &= mask - 1) {
      const unsigned lane = unsigned(__builtin_ctz(mask));
      if (t.id - t.lane() + lane < count_) body(warp[lane]);
    }
  }

  bool everyone_is_here(const Thread& t) {
    bool all = t.id - t.lane() + (31 - unsigned(__builtin_clz(t.mask))) < count_;
    for_lanes(t, [&](Thread& other) {
      all &= other.state == Thread::kInCollective && other.mask == t.mask && other.kind == t.kind;
    });
    return all;
  }

  void carry_out(const Thread& t) {
    uint64_t votes = 0;
    for_lanes(t, [&](Thread& lane) { votes |= uint64_t(lane.value != 0) << lane.lane(); });
    Thread* warp = &threads_[t.id - t.lane()];
    for_lanes(t, [&](Thread& lane) {
      if (lane.kind == Collective::kShuffle) {
        if (!(lane.mask >> lane.source & 1)) {
          error_ = "a shuffle reads lane " + std::to_string(lane.source) + ", which is not in its mask [block " +
                   text(block_index) + ", thread " + text(lane.index) + ", line " + std::to_string(lane.line) + "]";
        } else {
          lane.result = warp[lane.source].value;
        }
      } else if (lane.kind == Collective::kMatch) {
        lane.result = 0;
        for_lanes(t, [&](Thread& other) { lane.result |= uint64_t(other.value == lane.value) << other.lane(); });
      } else {
        lane.result = votes;
      }
    });
    for_lanes(t, [](Thread& lane) { lane.state = Thread::kReady; });
  }

  // Opens the barrier if the whole block waits at one; returns whether it does.
  bool open_barrier() {
    for (unsigned i = 0; i < count_; ++i) {
      if (threads_[i].state != Thread::kAtBarrier || threads_[i].line != threads_[0].line) return false;
    }
    for (unsigned i = 0; i < count_; ++i) threads_[i].state = Thread::kReady;
    return true;
  }

  std::string stuck() const {
    unsigned left = 0;
    const Thread* first = nullptr;
    const Thread* other = nullptr;
    for (unsigned i = 0; i < count_; ++i) {
      const Thread& t = threads_[i];
      if (t.state == Thread::kFinished) {
        ++left;
      } else if (!first) {
        first = &t;
      } else if (!other && (t.state != first->state || t.line != first->line)) {
        other = &t;
      }
    }
    const auto where = [](const Thread& t) {
      return "thread " + text(t.index) + " waits at " +
             (t.state == Thread::kAtBarrier ? "__syncthreads" : name_of(t.kind)) + " in line " + std::to_string(t.line);
    };
    std::string report = "divergence in block " + text(block_index) + ": " + where(*first);
    if (other) report += ", " + where(*other);
    if (left) report += ", " + std::to_string(left) + " of " + std::to_string(count_) + " threads have left the kernel";
    return report;
  }

  // ------------------------------------------------------------------------------------------------------------ fibers

  [[noreturn]] static void run_thread() {
    Engine& engine = instance();
    engine.arrived(nullptr, true);
    for (;;) {  // a fiber serves block after block
      engine.entry_(engine.argument_);
      engine.current->state = Thread::kFinished;
      engine.switch_to(*engine.current, engine.host_);
    }
  }

  void prepare(Thread& t) {
    if (!t.stack) {
      void* memory =
          mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) throw std::bad_alloc();
      t.stack = static_cast<char*>(memory);
      mprotect(t.stack, 4096, PROT_NONE);  // an overflow faults instead of writing into a neighbour
    }
#if defined(__x86_64__)
    // What change_stack pops: six registers, then the address to return to, on a stack aligned as after a call.
    void** top = reinterpret_cast<void**>(t.stack + kStackBytes) - 1;
    *top = nullptr;
    *--top = reinterpret_cast<void*>(&run_thread);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    t.stack_pointer = top;
#else
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack;
    t.context.uc_stack.ss_size = kStackBytes;
    makecontext(&t.context, reinterpret_cast<void (*)()>(&run_thread), 0);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(t.stack + 4096, kStackBytes - 4096);  // what a kernel that was given up left behind
#endif
    t.fake_stack = nullptr;
    t.entered = true;
  }

#if defined(__x86_64__)
  __attribute__((naked, noinline)) static void change_stack(void** /* save to */, void* /* load from */) {
    asm volatile(
        "push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15; movq %rsp, (%rdi); movq %rsi, %rsp;"
        "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");
  }
#endif

  void switch_to(Thread& from, Thread& to) {
    ++switches;
#if defined(__SANITIZE_ADDRESS__)
    const bool home = &to == &host_;
    __sanitizer_start_switch_fiber(&from.fake_stack, home ? host_bottom_ : to.stack, home ? host_bytes_ : kStackBytes);
#endif
#if defined(__x86_64__)
    change_stack(&from.stack_pointer, to.stack_pointer);
#else
    swapcontext(&from.context, &to.context);
#endif
    arrived(from.fake_stack, &from != &host_);
  }

  void arrived([[maybe_unused]] void* fake_stack, [[maybe_unused]] bool from_host) {
#if defined(__SANITIZE_ADDRESS__)
    const void* bottom = nullptr;
    size_t bytes = 0;
    __sanitizer_finish_switch_fiber(fake_stack, &bottom, &bytes);
    if (from_host) {
      host_bottom_ = bottom;
      host_bytes_ = bytes;
    }
#endif
  }

  std::vector<Thread> threads_{1024};  // never moves: running threads hold references
  Thread host_;
  const void* host_bottom_ = nullptr;
  size_t host_bytes_ = 0;
  unsigned count_ = 0;
  void (*entry_)(void*) = nullptr;
  void* argument_ = nullptr;
  std::mt19937 random_;
  std::vector<std::pair<const void*, void*>> static_shared_;
  size_t static_shared_bytes_ = 0;
  void* dynamic_shared_ = nullptr;
  std::string error_;
};

}  // namespace megalm::emulator
