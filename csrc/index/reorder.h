// Puts documents into another order with a limited memory: into buckets by their places, and then each bucket in order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "common.h"
#include "part.h"

namespace megapoly {

// A document of n bytes takes n + 16 of a bucket. Buckets fill buffers, which are appended to one file without a name, in
// the folder of `path`, whatever their number; where all fits the memory, there is no file.
class Reorder : public Documents {
public:
    // For `documents` documents of at most `bytes` bytes together, tokens of `item` bytes. Throws DataError where
    // `memory` is too small for so many.
    Reorder(const std::string& path, std::int64_t documents, std::int64_t bytes, std::int64_t item, std::int64_t memory);

    // The places of the documents that come next, each in [0, documents) and given once.
    void expect(const std::int64_t* places, std::int64_t count);
    void begin(std::int64_t tokens) override;
    void piece(const unsigned char* bytes, std::size_t size) override;
    void end() override;

    std::int64_t buckets() const noexcept { return static_cast<std::int64_t>(buckets_.size()); }
    // Hands the documents of a bucket on, in order, and lets go of what it held. Returns their bytes.
    std::int64_t drain(std::int64_t bucket, Documents& to);

private:
    struct Bucket {
        std::vector<unsigned char> buffer;     // its end, which has not been written
        std::vector<std::int64_t> extents;     // where its full buffers are in the file
        std::int64_t documents = 0;
    };
    struct Head {
        std::int64_t place;
        std::int64_t size;
    };

    void append(Bucket& to, const unsigned char* bytes, std::size_t size);
    // Calls visit(bytes, size) with a range of what is in a bucket, from the file and the buffer.
    template <typename Visit>
    void read(const Bucket& from, std::int64_t start, std::int64_t size, std::vector<unsigned char>& room, Visit&& visit);

    NamelessFile file_;
    std::int64_t documents_, item_, memory_;
    std::int64_t limit_ = 0;  // of a buffer, in bytes
    std::int64_t written_ = 0;
    std::vector<Bucket> buckets_;
    Bucket* open_ = nullptr;  // of the document that is coming
    std::vector<std::int64_t> places_;
    std::size_t next_ = 0;  // of them
};

}  // namespace megapoly
