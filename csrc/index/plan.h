// From sample numbers to windows: megapoly.data.plan_reference, bit for bit, without a table of a block.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "permutation.h"

namespace megapoly {

// How often every source comes in the first slots of one block. It moves to any slot from the nearest that is known:
// where it stands, the block's first or its end. So samples in order cost one step each, any other at most half a block.
class Slots {
public:
    // `quotas` are of `sources` sources and sum to `block`.
    Slots(const std::int64_t* quotas, std::size_t sources, std::int64_t block, std::uint64_t key);

    void move_to(std::int64_t slot);
    // Of the slot that it stands at, which is not the end.
    std::size_t source() const noexcept { return source_at(slot_); }
    // By source: earlier slots of the block that are its.
    const std::vector<std::int64_t>& counts() const noexcept { return counts_; }

private:
    std::size_t source_at(std::int64_t slot) const noexcept;

    std::vector<std::int64_t> ends_, counts_;  // by source: the sum of the quotas up to its own; slots before slot_
    std::int64_t block_, slot_ = 0;
    Permutation places_;
};

// By segment, ascending: its first sample [g] and block [g], quotas and starts [g, sources].
struct SegmentTable {
    std::vector<std::int64_t> first, block, quotas, starts;
};

// What to fill, each of the number of samples.
struct Places {
    std::int32_t* source;
    std::int64_t *window, *epoch, *count;
};

// A data plan. Beside its segments it keeps a few numbers for every source: its count in the block that was asked for
// last, and the permutation of its epoch. Safe from several threads.
class Plan {
public:
    // windows [sources] are those of an epoch. The key of the block that begins with sample n is
    // key_of(block_text + n + "]"), that of epoch n of a source key_of(epoch_texts[source] + n + "]").
    // Throws std::invalid_argument for numbers that are no plan.
    Plan(std::int64_t samples, SegmentTable segments, std::vector<std::int64_t> windows, std::string block_text,
         std::vector<std::string> epoch_texts);

    // Throws DataError for a sample outside the plan.
    void locate(const std::int64_t* samples, std::size_t count, const Places& out) const;

private:
    struct Epoch {
        std::int64_t number = -1;
        Permutation windows;
    };

    void locate_one(std::int64_t sample, const Places& out, std::size_t at) const;

    std::int64_t samples_;
    SegmentTable segments_;
    std::vector<std::int64_t> windows_;
    std::string block_text_;
    std::vector<std::string> epoch_texts_;

    mutable std::mutex lock_;  // of what follows
    mutable std::int64_t origin_ = -1;  // first sample of the block of slots_
    mutable std::optional<Slots> slots_;
    mutable std::vector<Epoch> epochs_;
};

}  // namespace megapoly
