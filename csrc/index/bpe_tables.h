// What byte-pair encoding looks up, made once from a model.
#pragma once

#include <cstdint>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "bpe_model.h"

namespace megapoly {

// A character: its code point and its length in bytes.
struct Character {
    std::uint32_t code;
    std::uint32_t length;
};

// The first character of valid, non-empty UTF-8.
inline Character decode(const char* text) noexcept {
    const auto byte = [&](int i) { return static_cast<std::uint32_t>(static_cast<unsigned char>(text[i])); };
    const std::uint32_t lead = byte(0);
    if (lead < 0x80) return {lead, 1};
    if (lead < 0xE0) return {(lead & 0x1FU) << 6 | (byte(1) & 0x3FU), 2};
    if (lead < 0xF0) return {(lead & 0x0FU) << 12 | (byte(1) & 0x3FU) << 6 | (byte(2) & 0x3FU), 3};
    return {(lead & 0x07U) << 18 | (byte(1) & 0x3FU) << 12 | (byte(2) & 0x3FU) << 6 | (byte(3) & 0x3FU), 4};
}

std::size_t characters_in(std::string_view valid) noexcept;

// The byte that a piece such as <0x0A> stands for, -1 where it is not such a piece.
int byte_of(std::string_view piece) noexcept;

// A *node* is a piece (its id) or a character that only stands inside of pieces (a number from the vocabulary on).
class BpeTables {
public:
    static constexpr std::uint32_t kNoMerge = 0xFFFFFFFFU;
    static constexpr std::int32_t kNoNode = -1;

    struct Merge {
        std::uint64_t pair = ~std::uint64_t{0};
        std::int32_t node = kNoNode;
        std::uint32_t rank = kNoMerge;  // 0 is the highest score; equal scores have equal ranks
    };

    explicit BpeTables(const BpeModel& model);

    // The node of a character, kNoNode where no piece holds it.
    std::int32_t node(std::uint32_t code) const noexcept {
        if (code < near_.size()) return near_[code];
        const auto found = far_.find(code);
        return found == far_.end() ? kNoNode : found->second;
    }

    // What two neighbours merge into; rank kNoMerge where they do not.
    Merge merge(std::int32_t left, std::int32_t right) const noexcept {
        if (left < 0 || right < 0) return {};
        const std::uint64_t pair = pair_of(left, right), hash = mix(pair);
        if (!may_merge(hash)) return {};
        for (std::size_t at = hash & mask_;; at = (at + 1) & mask_) {
            const Merge& found = merges_[at];
            if (found.pair == pair) return found;
            if (found.node == kNoNode) return {};
        }
    }

    // Has what merge() will look up fetched from memory, which takes longer than all else where there are many pieces.
    void expect(std::int32_t left, std::int32_t right) const noexcept {
        if (left < 0 || right < 0) return;
        const std::uint64_t hash = mix(pair_of(left, right));
        if (may_merge(hash)) __builtin_prefetch(&merges_[hash & mask_]);
    }

    // False where no piece holds the two characters side by side. May be true for a few of those, too.
    bool may_touch(std::uint32_t first, std::uint32_t second) const noexcept {
        const std::size_t bit = touch_bit(first, second);
        return (touching_[bit >> 6] >> (bit & 63U) & 1U) != 0;
    }

    // Adds the ids of a node that was not merged any further; `text` is what it stands for.
    void emit(std::int32_t node, std::string_view text, std::vector<std::int32_t>& ids) const {
        if (node >= 0 && node < vocabulary_)
            ids.push_back(node);
        else if (byte_ids_.empty())
            ids.push_back(unknown_);
        else
            for (const char byte : text) ids.push_back(byte_ids_[static_cast<unsigned char>(byte)]);
    }

    // Ids that stand in a row for one unknown piece are one id where there are no byte pieces.
    void join_unknown(std::vector<std::int32_t>& ids, std::size_t from) const;

private:
    static constexpr std::size_t kTouchBits = std::size_t{1} << 22;

    static std::uint64_t pair_of(std::int32_t left, std::int32_t right) noexcept {
        return static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32 | static_cast<std::uint32_t>(right);
    }
    static std::size_t mix(std::uint64_t value) noexcept {
        value *= 0x9E3779B97F4A7C15ULL;
        return value ^ value >> 32;
    }
    // False of most pairs that do not merge: a bit for each of four times as many as the table has places, which stay in
    // the processor's cache where the table does not.
    bool may_merge(std::uint64_t hash) const noexcept {
        const std::uint64_t bit = hash >> filter_shift_;
        return (filter_[bit >> 6] >> (bit & 63U) & 1U) != 0;
    }
    static std::size_t touch_bit(std::uint32_t first, std::uint32_t second) noexcept {
        if ((first | second) < 128) return first << 7 | second;  // exact for ASCII
        return mix(static_cast<std::uint64_t>(first) << 32 | second) & (kTouchBits - 1);
    }

    void add_characters(std::string_view piece);
    void add_merges(const std::vector<Piece>& pieces);

    std::int32_t vocabulary_, unknown_ = 0;
    std::vector<std::int32_t> byte_ids_;  // empty without byte fallback
    std::vector<std::int32_t> near_;
    std::unordered_map<std::uint32_t, std::int32_t> far_;
    std::int32_t characters_ = 0;  // nodes beyond the vocabulary
    std::vector<std::uint64_t> touching_;
    std::vector<Merge> merges_;
    std::size_t mask_ = 0;
    std::vector<std::uint64_t> filter_;
    unsigned filter_shift_ = 0;
};

}  // namespace megapoly
