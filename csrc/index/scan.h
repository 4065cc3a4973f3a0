// Reads blocks of a file for verification: their checksums, and the first id of each that is outside the vocabulary.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace megapoly {

struct Scanned {
    std::vector<std::uint32_t> crcs;      // one per block of kBlock bytes; fewer where the file ends earlier
    std::vector<std::int64_t> wrong;      // by block: the place of its first wrong token in the file, or -1
    std::vector<std::int64_t> wrong_ids;  // what stands there
};

// Blocks [first, first + blocks) of a file. `code` is the dtype code of its tokens, or 0 where it holds none.
Scanned scan(const std::string& path, int descriptor, int code, std::int64_t vocabulary, std::int64_t first,
             std::int64_t blocks);

}  // namespace megapoly
