// mbarrier: a barrier of 8 bytes in shared memory that counts arrivals and bytes (PTX ISA, "mbarrier").
//
// It is in one phase after another; a phase ends when as many threads have arrived as mbarrier_init said and all bytes
// expected in it have landed. mbarrier_wait(b, p) returns once the phase of parity p is over: the first phase has
// parity 0, so a wait for parity 1 on a new barrier returns at once (the empty slots of a ring).
#pragma once

#include <device/core.cuh>

namespace grokkernels::device {

// By one thread; before others touch it they must see that: fence_mbarrier_init, then sync_threads or cluster_sync.
GK_DEVICE void mbarrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes barriers that this thread has initialised visible to the copy engine and to other blocks of the cluster.
GK_DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

GK_DEVICE void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and the phase waits for `bytes` more.
GK_DEVICE void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Only the bytes, no arrival.
GK_DEVICE void mbarrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// At a barrier of any block of the cluster: an address that map_shared_rank gave. Says that this thread has read shared
// memory; what it wrote is not seen by the other block's threads.
GK_DEVICE void mbarrier_arrive_cluster(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// The same, and what this thread wrote before is seen by who waits there with mbarrier_wait_cluster. Costs a fence of
// the whole device's memory.
GK_DEVICE void mbarrier_arrive_cluster_release(uint32_t barrier) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, once for this thread, when the copies (device/async.cuh) that it has issued so far have landed. They belong
// to no group any more.
GK_DEVICE void mbarrier_arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

GK_DEVICE void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t over;
  do {
    asm volatile(
        "{\n.reg .pred over;\nmbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\nselp.u32 %0, 1, 0, over;\n}"
        : "=r"(over)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (over == 0);
}

// The same, seeing what threads of other blocks did before they arrived.
GK_DEVICE void mbarrier_wait_cluster(uint32_t barrier, uint32_t parity) {
  uint32_t over;
  do {
    asm volatile(
        "{\n.reg .pred over;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 over, [%1], %2;\n"
        "selp.u32 %0, 1, 0, over;\n}"
        : "=r"(over)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (over == 0);
}

}  // namespace grokkernels::device
