// Reads windows of tokens from a .bin file.
#pragma once

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

// Fills out[row][i] with token starts[row] + i, for i < length. Throws DataError where a window leaves the file, an id
// leaves the vocabulary, or the file cannot be read. Reads (rather than maps) the file, so that a file cut short or a
// failing disk is an error and not the end of the process.
void gather(const Tokens& tokens, const std::int64_t* starts, std::int64_t rows, std::int64_t length,
            std::int64_t* out);

}  // namespace megapoly
