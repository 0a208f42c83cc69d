// Memory of tensors on a CPU: freed blocks wait for the next tensor of their size, the newest first, as its bytes are
// still in the cache.
//
// In front of torch's own allocator, where every block comes from and goes back to beyond LIMIT. A training step asks for
// the same few sizes thousands of times; the C library splits and joins blocks for them, one thread alone, and hands out
// the oldest. The choice is in allocator.py; this file can be removed with it.

#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <pthread.h>

#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <vector>

namespace {

constexpr int FIRST = 6, LAST = 24;         // blocks of 2^FIRST to 2^LAST bytes are kept; larger ones are rare and dear
constexpr int STEPS = 16;                   // sizes per doubling: at most a sixteenth of a block is unused
constexpr int NUM = (LAST - FIRST) * STEPS + 1;
constexpr size_t AHEAD = 64;                 // bytes before those of the tensor: a note, and the alignment is kept
constexpr size_t LIMIT = size_t{128} << 20;  // bytes that wait at most

// The smallest size that holds n bytes, as an index; and back.
int index_of(size_t n) {
    if (n <= size_t{1} << FIRST) return 0;
    const int power = std::bit_width(n - 1) - 1;  // 2^power < n <= 2^(power + 1)
    const size_t step = (size_t{1} << power) / STEPS, part = (n - (size_t{1} << power) + step - 1) / step;
    return (power - FIRST) * STEPS + static_cast<int>(part);
}
size_t size_of(int index) { return ((size_t{1} << (FIRST + index / STEPS)) / STEPS) * static_cast<size_t>(STEPS + index % STEPS); }

class Blocks {
  public:
    void* take(int index) {
        {
            const std::lock_guard<std::mutex> guard(mutex_);
            if (!free_[index].empty()) {
                void* block = free_[index].back();
                free_[index].pop_back();
                kept_ -= size_of(index);
                return block;
            }
        }
        return make(size_of(index));
    }
    void* make(size_t size) {
        try {
            return c10::alloc_cpu(size + AHEAD);
        } catch (const c10::Error&) {  // there may be enough in the blocks that wait
            clear();
            return c10::alloc_cpu(size + AHEAD);
        }
    }
    void give(int index, void* block) {
        {
            const std::lock_guard<std::mutex> guard(mutex_);
            if (is_keeping_ && kept_ + size_of(index) <= LIMIT) {
                free_[index].push_back(block);
                kept_ += size_of(index);
                return;
            }
        }
        drop(block);
    }
    void clear() {
        std::array<std::vector<void*>, NUM> gone;
        {
            const std::lock_guard<std::mutex> guard(mutex_);
            gone.swap(free_);
            kept_ = 0;
        }
        for (auto& blocks : gone)
            for (void* block : blocks) drop(block);
    }
    void keep(bool is_keeping) {
        const std::lock_guard<std::mutex> guard(mutex_);
        is_keeping_ = is_keeping;
    }
    int64_t kept() {
        const std::lock_guard<std::mutex> guard(mutex_);
        return static_cast<int64_t>(kept_);
    }
    std::mutex& mutex() { return mutex_; }

  private:
    static void drop(void* block) {
        std::memset(block, 0, AHEAD);  // its mark must not be found by who gets the memory next
        c10::free_cpu(block);
    }

    std::mutex mutex_;
    std::array<std::vector<void*>, NUM> free_;
    size_t kept_ = 0;
    bool is_keeping_ = false;
};

// Never destroyed: tensors are freed until the very end of a process.
Blocks& blocks() {
    static Blocks* all = [] {
        auto* made = new Blocks;
        // A child must not be born while another thread has the lock.
        pthread_atfork([] { blocks().mutex().lock(); }, [] { blocks().mutex().unlock(); }, [] { blocks().mutex().unlock(); });
        return made;
    }();
    return *all;
}

// What stands before the bytes of a block. torch frees some blocks without saying who made them: a mark tells ours.
struct Note {
    uint64_t mark;
    int64_t index;  // of the size; -1: too large to wait
};
constexpr uint64_t MARK = 0x6b657074626c6f63;

Note* note_of(void* bytes) { return reinterpret_cast<Note*>(static_cast<char*>(bytes) - sizeof(Note)); }
uint64_t mark_of(void* bytes) { return MARK ^ reinterpret_cast<uintptr_t>(bytes); }

void release(void* bytes) {
    if (!bytes) return;
    if (note_of(bytes)->mark != mark_of(bytes)) return c10::free_cpu(bytes);  // made before this allocator was asked
    const int64_t index = note_of(bytes)->index;
    void* block = static_cast<char*>(bytes) - AHEAD;
    if (index >= 0) return blocks().give(static_cast<int>(index), block);
    note_of(bytes)->mark = 0;
    c10::free_cpu(block);
}

struct Allocator final : c10::Allocator {
    c10::DataPtr allocate(size_t n) override {
        void* bytes = nullptr;
        if (n > 0) {
            const int index = n <= size_of(NUM - 1) ? index_of(n) : -1;
            void* block = index >= 0 ? blocks().take(index) : blocks().make(n);
            bytes = static_cast<char*>(block) + AHEAD;
            *note_of(bytes) = {mark_of(bytes), index};
        }
        return {bytes, bytes, &release, c10::Device(c10::DeviceType::CPU)};
    }
    c10::DeleterFnPtr raw_deleter() const override { return &release; }
    void copy_data(void* to, const void* from, size_t n) const override { default_copy_data(to, from, n); }
};

constexpr uint8_t PRIORITY = 1;  // above the default, which is 0

// Keep freed blocks from now on; or give back those that wait and keep no more. Once asked for, the allocator stays.
void keep_blocks(bool is_on) {
    static Allocator* ours = new Allocator;
    blocks().keep(is_on);
    if (!is_on) blocks().clear();
    else c10::SetCPUAllocator(ours, PRIORITY);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(stylegan_rooted, m) {
    m.def("keep_blocks(bool is_on) -> ()", &keep_blocks);
    m.def("kept_bytes() -> int", [] { return blocks().kept(); });
}
