// Where the documents of a dataset begin, from its .idx alone.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace megapoly {

// The header of an .idx, and what is known of its .bin.
struct IndexFile {
    std::string path;
    int descriptor;            // open for reading
    std::int64_t sequences;    // their lengths (i32) begin at kLengths, their pointers (i64) follow, then the documents
    std::int64_t documents;    // document i begins with sequence indices[i]
    std::int64_t tokens;       // in the .bin
    std::int64_t item;         // bytes of a token
};

// Finds document boundaries with one small read where it has been before. The sequences stand in cells of equal size;
// where a cell begins is kept once it was asked for: at most kCells numbers, whatever the size of the file. Inside a cell
// the lengths are added up, and have to end where the pointers say that the next one begins: damage is an error, not a
// boundary elsewhere. Safe from several threads.
class Boundaries {
public:
    explicit Boundaries(IndexFile file);

    // Appends the first tokens of the documents that begin after `start` and at `last` at the latest, ascending, each
    // once. start < tokens of the file. Throws DataError where the .idx is damaged or cannot be read.
    void between(std::int64_t start, std::int64_t last, std::vector<std::int64_t>& found) const;

private:
    enum Kind : std::uint8_t { kUnknown, kOneEach, kMixed };

    std::int64_t first_token(std::int64_t cell) const;     // of a cell's first sequence; the tokens of the file at the end
    std::int64_t first_document(std::int64_t cell) const;  // that begins in a cell or after it
    std::int64_t cell_of(std::int64_t token) const;
    // Whether every sequence of a cell begins a document, and no two do; else `begins` is given those that do.
    bool one_each(std::int64_t cell, std::vector<std::int64_t>& begins) const;
    void visit(std::int64_t cell, const std::int32_t* lengths, std::int64_t start, std::int64_t last,
               std::vector<std::int64_t>& found) const;
    std::vector<std::int64_t> document_sequences(std::int64_t cell) const;
    template <typename T>
    void read(std::int64_t array, std::int64_t first, std::int64_t count, T* into) const;
    [[noreturn]] void damaged(const char* what, std::int64_t number) const;
    std::int64_t first_sequence(std::int64_t cell) const;

    IndexFile file_;
    std::int64_t pointers_, indices_;  // where these arrays begin in the file
    std::int64_t stride_, cells_;
    mutable std::unique_ptr<std::atomic<std::int64_t>[]> tokens_, documents_;  // by cell, plus 1; 0 is not known
    mutable std::unique_ptr<std::atomic<std::uint8_t>[]> kinds_;
};

}  // namespace megapoly
