// Reads a .bin that is merged with others, from start to end.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "batch.h"
#include "common.h"

namespace megapoly {

// What documents are handed to, one after another, each in any number of pieces.
class Documents {
public:
    virtual ~Documents() = default;
    virtual void begin(std::int64_t tokens) = 0;
    virtual void piece(const unsigned char* bytes, std::size_t size) = 0;
    virtual void end() = 0;
};

// The tokens of one dataset, read in blocks of kBlock bytes; the checksum of every block is compared, where there are any.
class Part {
public:
    // `descriptor` is open for reading, and duplicated; `size` is that of the file; one CRC for every block, or none.
    Part(std::string path, int descriptor, std::int64_t size, int code, std::vector<std::uint32_t> crcs);

    std::int64_t item() const noexcept { return item_; }
    const std::string& path() const noexcept { return path_; }

    // Calls visit(bytes, size) with the bytes [start, start + size) of the file, in order, in pieces that lie in one block.
    template <typename Visit>
    void read(std::int64_t start, std::int64_t size, Visit&& visit) {
        if (start < 0 || size < 0 || start > size_ - size) refuse(start, size);
        while (size > 0) {
            const auto block = static_cast<std::int64_t>(kBlock);
            load(start / block);
            const std::int64_t inside = start % block, part = std::min(size, block - inside);
            visit(static_cast<const unsigned char*>(block_.data()) + inside, static_cast<std::size_t>(part));
            start += part;
            size -= part;
        }
    }

    // Hands on documents of lengths[count] tokens that stand one after another from token `first` on, but for those that
    // have no token, and those for which keep[i] is 0, where keep is not null.
    void hand_on(std::int64_t first, const std::int64_t* lengths, std::int64_t count, const std::uint8_t* keep,
                 Documents& to);

private:
    void load(std::int64_t block);
    [[noreturn]] void refuse(std::int64_t start, std::int64_t size) const;

    std::string path_;
    Descriptor file_;
    std::int64_t size_, item_;
    std::vector<std::uint32_t> crcs_;
    std::vector<unsigned char> block_;
    std::int64_t loaded_ = -1;
};

}  // namespace megapoly
