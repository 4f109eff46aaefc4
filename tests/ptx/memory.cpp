#include "memory.h"

#include <cstring>

namespace {

const char* NAMES[] = {"read", "strong read", "write", "atomic"};

std::string where(u16 line) { return "line " + std::to_string(line); }

bool same_warp(const Access& a, const Access& b) {
    return a.program == b.program && a.thread != SEVERAL && b.thread != SEVERAL && a.thread / WARP == b.thread / WARP;
}

}  // namespace

std::string Complaints::text() const {
    std::string text;
    for (const auto& complaint : found) text += complaint + "\n";
    return text;
}

void Clock::join(const Clock& other) {
    for (size_t i = 0; i < all.size(); i++) all[i] = std::max(all[i], other.all[i]);
    std::erase_if(parts, [&](const Part& part) { return part.until < all[part.program]; });
    for (const Part& part : other.parts) learn(part.program, part.thread, part.until);
}

void Clock::learn(u16 program, u16 thread, u32 until) {
    if (until < all[program]) return;
    for (Part& part : parts) {
        if (part.program == program && part.thread == thread) {
            part.until = std::max(part.until, until);
            return;
        }
    }
    parts.push_back({program, thread, until});
}

bool Clock::includes(const Access& access) const {
    if (access.time < all[access.program]) return true;
    return std::any_of(parts.begin(), parts.end(), [&](const Part& part) {
        return part.program == access.program && part.thread == access.thread && access.time <= part.until;
    });
}

bool Program::knows(u16 thread, const Access& access) const {
    if (access.program == index && access.thread == thread) return true;
    return known.includes(access) || (acquired[thread] && acquired[thread]->includes(access));
}

void Program::meet() {
    known.all[index] = ++time;
    for (auto& clock : acquired) {
        if (clock) known.join(*clock);
        clock.reset();
    }
}

GlobalMemory::GlobalMemory(const Region* regions, size_t count, size_t programs, Complaints& races)
    : programs(programs), races(races) {
    for (size_t i = 0; i < count; i++) {
        const size_t cells = (regions[i].end - regions[i].start + regions[i].cell - 1) / regions[i].cell;
        blocks.push_back({regions[i], std::vector<Cell>(cells)});
    }
}

GlobalMemory::Block* GlobalMemory::block_of(u64 address) {
    if (last && last->start <= address && address < last->end) return last;
    auto after = std::upper_bound(blocks.begin(), blocks.end(), address,
                                  [](u64 value, const Block& block) { return value < block.start; });
    if (after == blocks.begin() || (after - 1)->end <= address) return nullptr;
    return last = &*(after - 1);
}

std::string GlobalMemory::check(u64 address, u32 bytes, u16 line) {
    if (address % bytes) return where(line) + ": a global access of " + std::to_string(bytes) + " bytes is misaligned";
    const Block* block = block_of(address);
    if (!block || address + bytes > block->end) {
        return where(line) + ": a global access of " + std::to_string(bytes) + " bytes at " + std::to_string(address) +
               (block ? " goes past the end of its memory" : " is outside all memory");
    }
    return "";
}

void GlobalMemory::report(const Access& earlier, const Access& later) {
    races.add(std::string("global race: ") + NAMES[int(earlier.kind)] + " at " + where(earlier.line) + " and " +
              NAMES[int(later.kind)] + " at " + where(later.line) + " of " +
              (earlier.program != later.program ? "two programs" : same_warp(earlier, later) ? "one warp" : "one program"));
}

// Atomics do not race with each other, nor reads; nor threads of a warp that write the same bytes in one instruction.
void GlobalMemory::against(const Program& program, const Access& earlier, const Access& later, bool same_bytes) {
    const auto is_atomic = [](Kind kind) { return kind == Kind::atomic || kind == Kind::strong_read; };
    const auto is_read = [](Kind kind) { return kind == Kind::read || kind == Kind::strong_read; };
    if (!earlier.time || program.knows(later.thread, earlier)) return;
    if (is_read(earlier.kind) && is_read(later.kind)) return;
    if (is_atomic(earlier.kind) && is_atomic(later.kind)) return;
    if (same_bytes && earlier.line == later.line && same_warp(earlier, later)) return;
    report(earlier, later);
}

// Keeps, of every program and kind, the last access, which all others of them are known to come before.
void GlobalMemory::record(Cell& cell, const Program& program, const Access& access) {
    const auto update = [&](Access& kept) {
        if (!kept.time) {
            kept = access;
        } else if (kept.program != access.program || kept.kind != access.kind) {
            return false;
        } else {
            const bool replaced = kept.thread == access.thread || program.known.includes(kept);
            kept = {access.time, access.program, replaced ? access.thread : SEVERAL, access.line, access.kind};
        }
        return true;
    };
    if (update(cell.first)) return;
    if (!cell.others) {
        lists.emplace_back();
        cell.others = u32(lists.size());
    }
    auto& list = lists[cell.others - 1];
    if (std::none_of(list.begin(), list.end(), update)) list.push_back(access);
}

void GlobalMemory::access(Program& program, u16 thread, u64 address, u32 bytes, Kind kind, u16 line, const void* value) {
    Block& block = *block_of(address);
    const Access now{program.time, program.index, thread, line, kind};
    const bool same_bytes = value && !std::memcmp(value, reinterpret_cast<const void*>(address), bytes);
    if (kind == Kind::write) {
        released.erase(address);
        block.stored += bytes;
    } else if (kind == Kind::read) {
        block.loaded += bytes;
    }
    const u64 end = (address + bytes - 1 - block.start) / block.cell;
    for (u64 i = (address - block.start) / block.cell; i <= end; i++) {
        Cell& cell = block.cells[i];
        if (cell.first.time == now.time && cell.first.program == now.program && cell.first.kind == kind &&
            cell.first.thread == thread && !cell.others && kind == Kind::read) {
            continue;
        }
        against(program, cell.write, now, same_bytes);
        against(program, cell.first, now, same_bytes);
        if (cell.others) {
            for (const Access& other : lists[cell.others - 1]) against(program, other, now, same_bytes);
        }
        if (kind == Kind::write) {
            cell.write = now;
            cell.first.time = 0;
            if (cell.others) lists[cell.others - 1].clear();
        } else {
            record(cell, program, now);
        }
    }
}

// A release hands on all that the thread knows; whoever acquires it from the same address, or from a later atomic, learns it.
void GlobalMemory::synchronize(Program& program, u16 thread, u64 address, Order order) {
    auto place = released.find(address);
    if (acquires(order) && place != released.end()) {
        auto& own = program.acquired[thread];
        if (!own) own = std::make_unique<Clock>(programs);
        own->join(place->second);
    }
    if (releases(order)) {
        if (place == released.end()) place = released.emplace(address, Clock(programs)).first;
        place->second.join(program.known);
        if (program.acquired[thread]) place->second.join(*program.acquired[thread]);
        place->second.learn(program.index, thread, program.time++);
    }
}

void GlobalMemory::count_traffic(Region* regions) const {
    for (size_t i = 0; i < blocks.size(); i++) {
        regions[i].loaded += blocks[i].loaded;
        regions[i].stored += blocks[i].stored;
    }
}

std::string SharedMemory::check(u32 address, u32 count, u16 line) const {
    if (address % count) return where(line) + ": a shared access of " + std::to_string(count) + " bytes is misaligned";
    if (address < SHARED || address + count > SHARED + size) return where(line) + ": outside shared memory";
    return "";
}

void SharedMemory::report(const Access& earlier, const Access& later, bool one_warp) {
    races.add(std::string("shared race: ") + NAMES[int(earlier.kind)] + " at " + where(earlier.line) + " and " +
              NAMES[int(later.kind)] + " at " + where(later.line) + (one_warp ? " of one warp" : " of two warps"));
}

// Only barriers order accesses here: a shuffle does not.
void SharedMemory::access(u32 phase, u16 thread, u32 address, u32 count, Kind kind, u16 line, const void* value) {
    const Access now{phase, 0, thread, line, kind};
    const bool same_bytes = value && !std::memcmp(value, at(address), count);
    const u32 own_warp = 1u << thread / WARP;
    for (u32 i = address - SHARED; i < address - SHARED + count; i++) {
        Cell& cell = cells[i];
        const bool written = cell.write.time == phase && cell.write.thread != thread;
        const bool read = cell.read.time == phase;
        if (kind == Kind::write) {
            const bool at_once = same_bytes && cell.write.line == line && same_warp(cell.write, now);
            if (written && !at_once) report(cell.write, now, same_warp(cell.write, now));
            if (read && cell.read.thread != thread) report(cell.read, now, !(cell.warps & ~own_warp));
            cell.write = now;
        } else {
            if (!cell.write.time) races.add("uninitialized shared memory is read at " + where(line));
            if (written) report(cell.write, now, same_warp(cell.write, now));
            cell.read = {phase, 0, read && cell.read.thread != thread ? SEVERAL : thread, line, kind};
            cell.warps = read ? cell.warps | own_warp : own_warp;
        }
    }
}
