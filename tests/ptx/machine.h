// What translated kernels ask of the machine that runs them: special registers, memory, and meetings with other threads.
#pragma once

#include "instructions.h"

enum class Order { weak, relaxed, acquire, release, acq_rel };

inline bool acquires(Order order) { return order == Order::acquire || order == Order::acq_rel; }
inline bool releases(Order order) { return order == Order::release || order == Order::acq_rel; }

// One GPU thread. Every `line` is that of the instruction in the PTX.
struct Thread {
    u32 tid, ntid, ctaid, nctaid;
    const u64* params;

    // Where bytes of global or shared memory may be read, after all checks.
    const void* load_global(u64 address, u32 bytes, Order order, u16 line);
    const void* load_shared(u32 address, u32 bytes, u16 line);
    void store_global(u64 address, const void* value, u32 bytes, u16 line);
    void store_shared(u32 address, const void* value, u32 bytes, u16 line);
    // Return the old value.
    u32 atomic_add(u64 address, u32 value, Order order, u16 line);
    u32 atomic_exchange(u64 address, u32 value, Order order, u16 line);
    // All threads of the program, or of the warp, have to come.
    void barrier(u16 line);
    u32 shuffle_xor(u32 value, u32 lane_mask, u16 line);
    void load_matrices(u32 address, u32 (&values)[4], u16 line);
};

using Kernel = void(Thread&);

// Where shared memory begins: not at 0, so that no other number passes for an address in it.
constexpr u32 SHARED = 0x1000;
// What a register holds before its first use.
constexpr u64 POISON = 0xdeadbeefdeadbeef;
