// Reads windows of tokens from a .bin file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace megapoly {

struct Tokens {
    std::string path;         // of the .bin, for messages
    int descriptor;           // open for reading
    int code;                 // dtype code of the format
    std::int64_t count;       // tokens in the file
    std::int64_t vocabulary;  // ids are from 0 to vocabulary - 1
};

// Reads (rather than maps) a part of an open file, so that a file cut short or a failing disk is a DataError and not the
// end of the process.
void read_exactly(const std::string& path, int descriptor, void* into, std::size_t size, std::int64_t offset);

// Throws DataError for a token of a window that is not an id of the vocabulary.
[[noreturn]] void refuse_id(const Tokens& tokens, std::int64_t token, std::int64_t id);

// Fills out[row][i] with token starts[row] + i, for i < length. Throws DataError where a window leaves the file, an id
// leaves the vocabulary, or the file cannot be read.
void gather(const Tokens& tokens, const std::int64_t* starts, std::int64_t rows, std::int64_t length,
            std::int64_t* out);

}  // namespace megapoly
