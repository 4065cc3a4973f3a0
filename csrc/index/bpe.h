// Byte-pair encoding as SentencePiece does it, token for token.
//
// The library merges, over the whole text, the neighbouring pair whose joined piece has the highest score, the leftmost
// of equals, until no pair forms a piece. Where no piece of the vocabulary holds two characters side by side, nothing is
// ever merged across them: the text falls into chunks there, which are encoded apart and, when short, remembered.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "bpe_model.h"
#include "normalizer.h"

namespace megapoly {

class BpeTables;

class BpeEncoder {
public:
    // Throws DataError where the bytes are not a SentencePiece model. A model that is one, but that uses what this
    // encoder does not cover, has a refusal().
    explicit BpeEncoder(std::string_view model);
    ~BpeEncoder();
    BpeEncoder(BpeEncoder&&) noexcept;

    // Why the model is not covered; empty where it is.
    const std::string& refusal() const noexcept { return refusal_; }

    // The ids of `texts` (any bytes) one after another, and how many each has; on `threads` threads.
    void encode(const std::vector<std::string_view>& texts, int threads, std::vector<std::int32_t>& ids,
                std::vector<std::int64_t>& lengths) const;

private:
    std::string refusal_;
    std::unique_ptr<const Normalizer> normalizer_;
    std::unique_ptr<const BpeTables> tables_;
};

}  // namespace megapoly
