// Writes Megatron's indexed format: PREFIX.bin (tokens) and PREFIX.idx (lengths, pointers, documents).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common.h"
#include "part.h"

namespace megapoly {

struct Written {
    std::int64_t documents;
    std::int64_t tokens;
    std::vector<std::uint32_t> bin_crcs;  // one per block of kBlock bytes
    std::vector<std::uint32_t> idx_crcs;
};

// One sequence per document. Memory grows by 4 bytes per block only: lengths wait in a file without a name.
class Writer : public Documents {
public:
    // `code` is a dtype code of the format; ids are from 0 to vocabulary - 1, all of which the dtype has to hold.
    Writer(const std::string& bin_path, const std::string& idx_path, int code, std::int64_t vocabulary);

    // Appends `documents` documents of lengths[i] >= 1 tokens, which stand one after another in ids[count].
    // Nothing is written where an id or a length is wrong. Id is std::int32_t or std::int64_t.
    template <typename Id>
    void append(const Id* ids, std::int64_t count, const std::int64_t* lengths, std::int64_t documents);

    // Appends one document as it stands in another file of the same dtype.
    void begin(std::int64_t tokens) override;
    void piece(const unsigned char* bytes, std::size_t size) override;
    void end() override;

    std::int64_t documents() const noexcept { return documents_; }
    std::int64_t tokens() const noexcept { return tokens_; }
    int code() const noexcept { return code_; }
    const std::string& path() const noexcept { return bin_.path(); }

    // Writes the index and brings both files to the disk. The writer is of no use afterwards.
    Written finish();

private:
    template <typename Id>
    void check(const Id* ids, std::int64_t count, const std::int64_t* lengths, std::int64_t documents) const;

    void require_whole() const;

    OutputFile bin_;
    OutputFile idx_;
    int code_;
    std::int64_t item_size_;
    std::int64_t vocabulary_;
    std::int64_t tokens_ = 0;
    std::int64_t documents_ = 0;
    std::int64_t missing_ = 0;  // bytes of the document that is being appended
    bool failed_ = false;
    Spool lengths_;  // i32 each
};

}  // namespace megapoly
