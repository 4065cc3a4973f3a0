// Best-fit packs: documents in rows of one length, each whole where it fits one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "part.h"
#include "writer.h"

namespace megapoly {

// Best-fit decreasing: the longest first, each into the pack with the least room in which it fits (of several the one
// that was filled last), or into a new one. lengths[count] are in [1, pack], and fewer than 2^31. Returns the pack of
// every item; packs are numbered as they were begun. Time is count log(pack) / log(64).
std::vector<std::int32_t> best_fit(const std::int32_t* lengths, std::int64_t count, std::int64_t pack);

// Documents into packs of one length (Ding et al., "Fewer Truncations Improve Language Modeling", 2024). A longer one is
// cut into pieces of that length, each a pack, written at once; what is left of it, and all others, wait until there are
// kTokens tokens or kDocuments of them, and are packed best-fit. Packs follow each other by their earliest document, and
// documents in a pack keep their order. The room that is left is one more document, of the token that ends every other.
class Packer : public Documents {
public:
    static constexpr std::int64_t kTokens = std::int64_t{1} << 25;
    static constexpr std::int64_t kDocuments = std::int64_t{1} << 21;

    // Packs of `pack` >= 2 tokens, at most kTokens. `end` ends every document. Throws DataError for a document that does
    // not, or of which a piece begins with it and could not be told from padding.
    Packer(Writer& to, std::int64_t pack, std::int64_t end);

    void begin(std::int64_t tokens) override;
    void piece(const unsigned char* bytes, std::size_t size) override;
    void end() override;
    // Packs and writes what waits.
    void flush();

    std::int64_t cut() const noexcept { return cut_; }                      // documents longer than a pack
    std::int64_t padded() const noexcept { return padded_; }                // packs with padding
    std::int64_t padding_tokens() const noexcept { return padding_tokens_; }

private:
    std::int64_t token(const unsigned char* bytes) const;
    void begin_piece();
    void require_whole() const;

    Writer& to_;
    std::int64_t pack_, end_, item_;
    std::vector<unsigned char> bytes_;   // of the documents that wait
    std::vector<std::int32_t> lengths_;  // theirs, in tokens
    std::vector<unsigned char> padding_;
    std::int64_t left_ = 0;   // tokens of the document that are to come
    std::int64_t inner_ = 0;  // bytes of its piece that are to come
    bool whole_ = false;      // its piece is a pack
    bool open_ = false;       // it has not come whole
    std::int64_t last_ = -1;  // the last token that came
    std::int64_t cut_ = 0, padded_ = 0, padding_tokens_ = 0;
};

}  // namespace megapoly
