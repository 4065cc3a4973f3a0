// SentencePiece's normaliser: replacements by a precompiled map, and its rules for spaces.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "bpe_model.h"

namespace megapoly {

// Length in bytes of the valid UTF-8 character at the beginning of `text`, 0 where there is none.
std::size_t character_length(std::string_view text) noexcept;

class Normalizer {
public:
    // Throws DataError where the precompiled map is damaged.
    explicit Normalizer(const BpeModel& model);

    // Replaces `out` by the normalised text: valid UTF-8 whatever the input.
    void normalize(std::string_view text, std::string& out) const;

private:
    struct Step {
        std::string_view text;  // what stands for the beginning of the input
        std::size_t consumed;   // bytes of the input
    };
    Step first(std::string_view text) const;
    void append(std::string_view text, std::string& out) const;

    bool suffix_, dummy_prefix_, remove_extra_, escape_;
    std::vector<std::uint32_t> trie_;
    std::string replacements_;
};

}  // namespace megapoly
