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

bool is_utf8(std::string_view text) noexcept;

// A precompiled map of a model: what stands for the beginning of a text.
class CharacterMap {
public:
    struct Found {
        std::string_view text;  // what stands for the beginning of the input
        std::size_t consumed;   // bytes of the input; 0 where the map says nothing of it
    };

    // Throws DataError where the map is damaged: where some path through it leaves it, in this encoder or in the
    // library, which does not look, or a replacement is not UTF-8.
    explicit CharacterMap(std::string_view map);

    bool empty() const noexcept { return trie_.empty(); }
    Found find(std::string_view text) const noexcept;

private:
    void check_paths() const;

    std::vector<std::uint32_t> trie_;
    std::string replacements_;
};

class Normalizer {
public:
    // Throws DataError where the precompiled map is damaged.
    explicit Normalizer(const BpeModel& model);

    // Replaces `out` by the normalised text: valid UTF-8 whatever the input.
    void normalize(std::string_view text, std::string& out) const;

private:
    CharacterMap::Found first(std::string_view text) const;
    void append(std::string_view text, std::string& out) const;

    bool suffix_, dummy_prefix_, remove_extra_, escape_;
    CharacterMap map_;
};

}  // namespace megapoly
