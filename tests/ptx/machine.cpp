// Runs a translated kernel: a fiber for every thread of the resident programs, and a scheduler that draws whose turn it is.
#include <sys/mman.h>

#include <cstring>
#include <random>
#include <utility>

#include "memory.h"

namespace {

constexpr size_t STACK = 64 << 10;
// Turns without a write to global memory, for each resident thread, after which all are waiting for what never comes.
constexpr u64 PATIENCE = 2000;

struct Machine;
struct Cta;

struct Fiber : Thread {
    void* stack_pointer;
    Cta* cta;
    u16 meeting = 0;  // the line where it waits for others
    u32 operand, operand2;
    u32 results[4];
};

struct Cta {
    Cta(Machine& machine, u32 index);
    void release(u32 first, u32 count);

    Machine& machine;
    Program program;
    SharedMemory shared;
    std::vector<Fiber> fibers;
    std::vector<Fiber*> runnable;
    std::vector<u32> at_shuffle;  // for every warp, how many wait
    u32 at_barrier = 0, running;
    char* stacks;
};

struct Launch {
    Kernel* kernel;
    const u64* params;
    u32 programs, threads, shared, resident;
    u64 seed;
};

struct Machine {
    Machine(const Launch& launch, const Region* regions, size_t count)
        : launch(launch), global(regions, count, launch.programs, complaints), random(launch.seed) {}
    void run();
    void admit();
    Cta& choose();
    void turn(Cta& cta);
    void retire(Cta& cta);
    [[noreturn]] void fail(const std::string& message);
    bool chance(u32 percent) { return random() % 100 < percent; }

    const Launch& launch;
    Complaints complaints;
    GlobalMemory global;
    std::mt19937 random;
    std::string error;
    std::vector<u32> waiting;  // programs to come, the next one last
    std::vector<std::unique_ptr<Cta>> resident;
    std::vector<char*> free_stacks;
    Cta* last = nullptr;
    u32 loyalty = 0;  // how often, of 100 turns, the same program goes on
    bool in_order = false;
    u64 idle = 0;
    Fiber* current = nullptr;
    void* scheduler;  // its stack pointer
};

Machine* machine;  // the one that runs

extern "C" void ptx_switch(void** save, void* load);
asm(R"(
.globl ptx_switch
ptx_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

void suspend() { ptx_switch(&machine->current->stack_pointer, machine->scheduler); }

// Others may have turns before this thread goes on.
void give_way(Fiber& fiber) {
    fiber.cta->runnable.push_back(&fiber);
    suspend();
}

void enter() {
    Fiber& fiber = *machine->current;
    machine->launch.kernel(fiber);
    fiber.cta->running--;
    suspend();
}

Cta::Cta(Machine& machine, u32 index)
    : machine(machine), program(u16(index), machine.launch.programs, machine.launch.threads),
      shared(machine.launch.shared, machine.complaints), fibers(machine.launch.threads),
      at_shuffle(machine.launch.threads / WARP, 0), running(machine.launch.threads) {
    stacks = machine.free_stacks.back();
    machine.free_stacks.pop_back();
    for (u32 i = 0; i < fibers.size(); i++) {
        Fiber& fiber = fibers[i];
        static_cast<Thread&>(fiber) = {i, u32(fibers.size()), index, machine.launch.programs, machine.launch.params};
        fiber.cta = this;
        void** top = reinterpret_cast<void**>(stacks + (i + 1) * STACK) - 1;  // as a call leaves the stack: 8 off 16
        *top = nullptr;
        *--top = reinterpret_cast<void*>(enter);
        fiber.stack_pointer = top - 6;
        runnable.push_back(&fiber);
    }
}

void Cta::release(u32 first, u32 count) {
    for (u32 i = first; i < first + count; i++) {
        fibers[i].meeting = 0;
        runnable.push_back(&fibers[i]);
    }
}

void Machine::fail(const std::string& message) {
    error = message + " (program " + std::to_string(current->ctaid) + ", thread " + std::to_string(current->tid) + ")";
    suspend();
    __builtin_unreachable();
}

void Machine::admit() {
    while (resident.size() < launch.resident && !waiting.empty()) {
        resident.push_back(std::make_unique<Cta>(*this, waiting.back()));
        waiting.pop_back();
    }
}

void Machine::retire(Cta& cta) {
    free_stacks.push_back(cta.stacks);
    std::erase_if(resident, [&](const auto& other) { return other.get() == &cta; });
    last = nullptr;
    idle = 0;
    admit();
}

// Now and then it also draws anew how it draws: all programs alike, or one for long while the others stand still.
Cta& Machine::choose() {
    if (random() % 5000 == 0) {
        const u32 choices[] = {0, 90, 100};
        loyalty = choices[random() % 3];
        in_order = chance(30);
    }
    if (last && !last->runnable.empty() && chance(loyalty)) return *last;
    const size_t start = random() % resident.size();
    for (size_t i = 0; i < resident.size(); i++) {
        Cta& cta = *resident[(start + i) % resident.size()];
        if (!cta.runnable.empty()) return *(last = &cta);
    }
    return *resident[start];
}

void Machine::turn(Cta& cta) {
    auto& runnable = cta.runnable;
    if (!in_order) std::swap(runnable[random() % runnable.size()], runnable.back());
    current = runnable.back();
    runnable.pop_back();
    ptx_switch(&scheduler, current->stack_pointer);
    if (error.empty() && !cta.running) retire(cta);
}

void Machine::run() {
    const size_t stacks = STACK * launch.threads, count = std::min(launch.resident, launch.programs);
    char* memory = static_cast<char*>(mmap(nullptr, stacks * count, PROT_READ | PROT_WRITE,
                                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (memory == MAP_FAILED) throw std::bad_alloc();
    for (size_t i = 0; i < count; i++) free_stacks.push_back(memory + i * stacks);
    for (u32 i = 0; i < launch.programs; i++) waiting.push_back(i);
    std::shuffle(waiting.begin(), waiting.end(), random);
    admit();
    while (!resident.empty() && error.empty()) {
        Cta& cta = choose();
        if (cta.runnable.empty()) {
            error = "deadlock: threads wait at a barrier or a shuffle for others that never come";
        } else if (++idle > PATIENCE * launch.threads * resident.size()) {
            error = "deadlock: the programs wait for each other";
        } else {
            turn(cta);
        }
    }
    munmap(memory, stacks * count);
}

Fiber& fiber_of(Thread* thread) { return static_cast<Fiber&>(*thread); }

// The threads first .. first + count of a program meet; the last one to come does `work` and lets all go on.
template <class Work> void meet(Fiber& fiber, u32& arrived, u32 first, u32 count, u16 line, Work work) {
    Cta& cta = *fiber.cta;
    fiber.meeting = line;
    if (++arrived == count) {
        arrived = 0;
        for (u32 i = 0; i < count; i++) {
            const u32 lead = first + i / WARP * WARP;
            if (cta.fibers[first + i].meeting != cta.fibers[lead].meeting) {
                machine->fail("line " + std::to_string(line) + ": threads of one warp meet at different instructions");
            }
        }
        work();
        cta.release(first, count);
    }
    suspend();
}

void check(const std::string& message) {
    if (!message.empty()) machine->fail(message);
}

u32 shared_phase(const Fiber& fiber) { return fiber.cta->program.known.all[fiber.ctaid] + 1; }

template <class Update> u32 atomic(Fiber& fiber, u64 address, Order order, u16 line, Update update) {
    give_way(fiber);
    check(machine->global.check(address, 4, line));
    auto& program = fiber.cta->program;
    machine->global.access(program, u16(fiber.tid), address, 4, Kind::atomic, line);
    machine->global.synchronize(program, u16(fiber.tid), address, order);
    u32& place = *reinterpret_cast<u32*>(address);
    machine->idle = 0;
    return std::exchange(place, update(place));
}

}  // namespace

const void* Thread::load_global(u64 address, u32 bytes, Order order, u16 line) {
    Fiber& fiber = fiber_of(this);
    if (order != Order::weak) give_way(fiber);
    check(machine->global.check(address, bytes, line));
    auto& program = fiber.cta->program;
    machine->global.access(program, u16(tid), address, bytes, order == Order::weak ? Kind::read : Kind::strong_read, line);
    machine->global.synchronize(program, u16(tid), address, order);
    return reinterpret_cast<const void*>(address);
}

void Thread::store_global(u64 address, const void* value, u32 bytes, u16 line) {
    check(machine->global.check(address, bytes, line));
    machine->global.access(fiber_of(this).cta->program, u16(tid), address, bytes, Kind::write, line, value);
    std::memcpy(reinterpret_cast<void*>(address), value, bytes);
    machine->idle = 0;
}

const void* Thread::load_shared(u32 address, u32 bytes, u16 line) {
    Fiber& fiber = fiber_of(this);
    check(fiber.cta->shared.check(address, bytes, line));
    fiber.cta->shared.access(shared_phase(fiber), u16(tid), address, bytes, Kind::read, line);
    return fiber.cta->shared.at(address);
}

void Thread::store_shared(u32 address, const void* value, u32 bytes, u16 line) {
    Fiber& fiber = fiber_of(this);
    check(fiber.cta->shared.check(address, bytes, line));
    fiber.cta->shared.access(shared_phase(fiber), u16(tid), address, bytes, Kind::write, line, value);
    std::memcpy(fiber.cta->shared.at(address), value, bytes);
}

u32 Thread::atomic_add(u64 address, u32 value, Order order, u16 line) {
    return atomic(fiber_of(this), address, order, line, [=](u32 old) { return old + value; });
}

u32 Thread::atomic_exchange(u64 address, u32 value, Order order, u16 line) {
    return atomic(fiber_of(this), address, order, line, [=](u32) { return value; });
}

void Thread::barrier(u16 line) {
    Fiber& fiber = fiber_of(this);
    meet(fiber, fiber.cta->at_barrier, 0, ntid, line, [&] { fiber.cta->program.meet(); });
}

u32 Thread::shuffle_xor(u32 value, u32 lane_mask, u16 line) {
    Fiber& fiber = fiber_of(this);
    const u32 first = tid / WARP * WARP;
    fiber.operand = value;
    fiber.operand2 = lane_mask;
    meet(fiber, fiber.cta->at_shuffle[tid / WARP], first, WARP, line, [&] {
        Fiber* warp = &fiber.cta->fibers[first];
        for (u32 i = 0; i < WARP; i++) warp[i].results[0] = warp[(i ^ warp[i].operand2) % WARP].operand;
    });
    return fiber.results[0];
}

// Lane 8 i + j has the address of row j of matrix i; lane 4 j + k gets the k-th word of row j of every matrix.
void Thread::load_matrices(u32 address, u32 (&values)[4], u16 line) {
    Fiber& fiber = fiber_of(this);
    const u32 first = tid / WARP * WARP;
    fiber.operand = address;
    check(fiber.cta->shared.check(address, 16, line));
    meet(fiber, fiber.cta->at_shuffle[tid / WARP], first, WARP, line, [&] {
        Fiber* warp = &fiber.cta->fibers[first];
        for (u32 lane = 0; lane < WARP; lane++) {
            for (u32 i = 0; i < 4; i++) {
                const u32 word = warp[8 * i + lane / 4].operand + 4 * (lane % 4);
                std::memcpy(&warp[lane].results[i], warp[lane].load_shared(word, 4, line), 4);
            }
        }
    });
    std::copy(fiber.results, fiber.results + 4, values);
}

// Returns an empty text, or what went wrong; it is valid until the next run. Adds to what was moved in each region.
extern "C" const char* ptx_run(const Launch* launch, Region* regions, size_t count) {
    static std::string text;
    Machine own(*launch, regions, count);
    machine = &own;
    own.run();
    own.global.count_traffic(regions);
    machine = nullptr;
    text = own.error + (own.error.empty() ? "" : "\n") + own.complaints.text();
    return text.c_str();
}
