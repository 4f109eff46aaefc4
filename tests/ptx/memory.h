// Global and shared memory with what compute-sanitizer's memcheck and racecheck would look for, and across programs too.
//
// Global accesses are ordered by happens-before: program order, barriers, and chains of release and acquire through atomics.
// Two accesses to a cell without such an order are a race, whichever came first in this run.
#pragma once

#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "machine.h"

// Of `Access`: more than one thread of a program.
constexpr u16 SEVERAL = 0xffff;
constexpr u32 WARP = 32;

enum class Kind : u16 { read, strong_read, write, atomic };

struct Access {
    u32 time = 0;  // the program's own clock; 0: there was none
    u16 program, thread, line;
    Kind kind;
};

// What a thread knows to have happened: for every program, everything before `all`, and of single threads more.
class Clock {
  public:
    explicit Clock(size_t programs) : all(programs, 0) {}
    void join(const Clock& other);
    void learn(u16 program, u16 thread, u32 until);
    bool includes(const Access& access) const;

    std::vector<u32> all;

  private:
    struct Part {
        u16 program, thread;
        u32 until;
    };
    std::vector<Part> parts;
};

// A program's time, which moves on at every barrier and release, and what its threads know.
struct Program {
    Program(u16 index, size_t programs, size_t threads) : index(index), known(programs), acquired(threads) {}
    bool knows(u16 thread, const Access& access) const;
    void meet();  // at a barrier

    u16 index;
    u32 time = 1;
    Clock known;                                   // to all threads, since the last barrier
    std::vector<std::unique_ptr<Clock>> acquired;  // by single threads after it
};

// Distinct complaints, up to a number of them.
class Complaints {
  public:
    void add(const std::string& complaint) {
        if (found.size() < 20) found.insert(complaint);
    }
    std::string text() const;

  private:
    std::set<std::string> found;
};

struct Region {
    u64 start, end;
    u32 cell;           // bytes: of an element
    u64 loaded, stored; // bytes, by all threads, without atomics
};

class GlobalMemory {
  public:
    GlobalMemory(const Region* regions, size_t count, size_t programs, Complaints& races);
    // Each returns an error, or nothing.
    std::string check(u64 address, u32 bytes, u16 line);
    void access(Program& program, u16 thread, u64 address, u32 bytes, Kind kind, u16 line, const void* value = nullptr);
    void synchronize(Program& program, u16 thread, u64 address, Order order);
    void count_traffic(Region* regions) const;

  private:
    struct Cell {
        Access write, first;  // the last plain write; since then one of the others
        u32 others = 0;       // index of more, plus one
    };
    struct Block : Region {
        std::vector<Cell> cells;
    };
    Block* block_of(u64 address);
    void record(Cell& cell, const Program& program, const Access& access);
    void report(const Access& earlier, const Access& later);
    void against(const Program& program, const Access& earlier, const Access& later, bool same_bytes);

    std::vector<Block> blocks;
    Block* last = nullptr;
    std::deque<std::vector<Access>> lists;
    std::map<u64, Clock> released;
    size_t programs;
    Complaints& races;
};

class SharedMemory {
  public:
    SharedMemory(size_t size, Complaints& races) : bytes(size + 16, 0xa5), cells(size), size(size), races(races) {}
    std::string check(u32 address, u32 count, u16 line) const;
    void access(u32 phase, u16 thread, u32 address, u32 count, Kind kind, u16 line, const void* value = nullptr);
    u8* at(u32 address) { return aligned() + (address - SHARED); }

  private:
    struct Cell {
        Access write, read;
        u32 warps = 0;  // that have read since the last barrier
    };
    u8* aligned() { return reinterpret_cast<u8*>((reinterpret_cast<u64>(bytes.data()) + 15) & ~u64(15)); }
    void report(const Access& earlier, const Access& later, bool one_warp);

    std::vector<u8> bytes;
    std::vector<Cell> cells;
    size_t size;
    Complaints& races;
};
