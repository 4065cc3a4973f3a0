// Rows of a batch from the windows of one dataset: tokens, labels, positions and documents.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

#include "gather.h"

namespace megapoly {

// Little-endian 64-bit integers of a mapped file, which may lie at any address.
class Numbers {
public:
    explicit Numbers(const void* bytes) : bytes_(static_cast<const unsigned char*>(bytes)) {}
    std::int64_t operator[](std::int64_t i) const noexcept {
        std::int64_t value;
        std::memcpy(&value, bytes_ + 8 * i, sizeof(value));
        return value;
    }

private:
    const unsigned char* bytes_;
};

// Where the documents of a dataset begin: document i at pointers[indices[i]] bytes. Both are checked as they are read.
struct Boundaries {
    std::string path;  // of the .idx
    Numbers pointers;
    std::int64_t sequences;
    Numbers indices;
    std::int64_t documents;
    std::int64_t item;  // bytes of a token
};

// What to fill, each [rows of the batch, length]; a null pointer is left out.
struct Columns {
    std::int64_t* tokens;
    std::int64_t* labels;
    std::int64_t* positions;
    std::int32_t* documents;
};

// Fills row rows[i] with the window of `length` tokens from token starts[i], whose labels are the tokens after each; of
// a window that reaches beyond `limit`, only what is before it. The rest of such a row holds token 0 and label -1. Where
// boundaries are given, positions begin again in every document, documents are numbered from 0 in every row, and no
// label crosses from one into the next. Throws DataError for a start that is not in the file or an id outside the
// vocabulary.
void fill(const Tokens& tokens, const Boundaries* boundaries, const std::int64_t* starts, const std::int64_t* rows,
          std::int64_t count, std::int64_t length, std::int64_t limit, const Columns& out);

}  // namespace megapoly
