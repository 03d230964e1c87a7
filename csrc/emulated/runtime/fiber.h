// Switching between the stacks of emulated threads, and telling sanitizers about it.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#error "the emulated device switches stacks with x86-64 instructions; build it on an x86-64 machine"
#endif

#if defined(__SANITIZE_THREAD__)
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* place);
void __tsan_release(void* place);
void __tsan_write_range(void* memory, unsigned long bytes);
void __tsan_read_range(void* memory, unsigned long bytes);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif
#if defined(__SANITIZE_ADDRESS__)
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
void __asan_poison_memory_region(void const volatile* memory, size_t bytes);
void __asan_unpoison_memory_region(void const volatile* memory, size_t bytes);
}
#endif

namespace grokkernels::emulated {

// Pushes what the System V ABI wants kept, stores the stack pointer in *save and goes on where `to` was stored.
void switch_stack(void** save, void* to);

// Between these the race checker does not see memory accesses: they are the device's own, not the kernel's.
inline void begin_unwatched() {
#if defined(__SANITIZE_THREAD__)
  AnnotateIgnoreReadsBegin("", 0);
  AnnotateIgnoreWritesBegin("", 0);
#endif
}

inline void end_unwatched() {
#if defined(__SANITIZE_THREAD__)
  AnnotateIgnoreReadsEnd("", 0);
  AnnotateIgnoreWritesEnd("", 0);
#endif
}

struct Unwatched {
  Unwatched() { begin_unwatched(); }
  ~Unwatched() { end_unwatched(); }
};

}  // namespace grokkernels::emulated
